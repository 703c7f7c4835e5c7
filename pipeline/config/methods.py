"""The table of pruning methods, with their help texts and defaults.

A method is one file in `pipeline/solvers/methods/` and one line here. The file has a solver class,
and above it two literals, `HELP` and `DEFAULTS`. These, and what the class says that it reads, are
read from the source without importing it, as setuptools reads a version, so that `--help` and the
checks of options need no torch.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from storage.errors import ConfigError

METHODS: dict[str, str] = {
    "magnitude": "pipeline.solvers.methods.magnitude.MagnitudeSolver",
    "wanda": "pipeline.solvers.methods.wanda.WandaSolver",
    "sparsegpt": "pipeline.solvers.methods.sparsegpt.SparseGptSolver",
    "prox": "pipeline.solvers.methods.prox.ProxSolver",
    "prox_admm": "pipeline.solvers.methods.prox_admm.ProxAdmmSolver",
}
"""Name → dotted name of the solver's class, a subclass of `pipeline.solvers.base.BaseSolver`."""


@dataclass(frozen=True)
class MethodFacts:
    """What is known of a method without importing its file.

    help: one line on how it prunes. damping, shrinkage: its default regularization. refine: its
    default refinement. refine_steps: the default steps of that refinement; None for the
    refinement's usual number. statistic, method_settings: as in `BaseSolver`.
    """

    help: str
    damping: float
    shrinkage: float | str
    refine: str = "none"
    refine_steps: int | None = None
    statistic: str = "full"
    method_settings: tuple[str, ...] = ()


def method_names() -> tuple[str, ...]:
    """The names of all methods, in the table's order."""
    return tuple(METHODS)


def method_facts(name: str) -> MethodFacts:
    """The facts of a method. Raises `ConfigError` for an unknown method."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    module, _, solver = METHODS[name].rpartition(".")
    return _read_facts(module, solver)


def methods_help() -> str:
    """Each method's name and help, for a help text."""
    return ", ".join(f"{name} ({method_facts(name).help})" for name in METHODS)


def defaults_text(setting: str) -> str:
    """Each method's default of a setting, for a help text: `wanda 0, prox 0.01`."""
    values = {name: getattr(method_facts(name), setting) for name in METHODS}
    return ", ".join(
        f"{name} {value if isinstance(value, str) else format(value, 'g')}"
        for name, value in values.items()
    )


_LITERALS = ("HELP", "DEFAULTS")
# Of the class, where it differs from `BaseSolver`.
_OF_THE_CLASS = ("statistic", "method_settings")


@cache
def _read_facts(module: str, solver: str) -> MethodFacts:
    """The facts of the class `solver`, parsed from the source of its module."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the method's module {module} does not exist")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    literals = _assigned(tree, _LITERALS, spec.origin)
    of_class: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == solver:
            of_class = _assigned(node, _OF_THE_CLASS, f"{solver} in {spec.origin}")
    try:
        return MethodFacts(help=literals["HELP"], **literals["DEFAULTS"], **of_class)
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{spec.origin} must have HELP, a string, and DEFAULTS, a dict of MethodFacts' other "
            f"fields: {error}"
        ) from error


def _assigned(node: ast.Module | ast.ClassDef, names: Sequence[str], where: str) -> dict[str, Any]:
    """Name → value of the literals that are assigned in a module or class itself."""
    values = {}
    for line in node.body:
        target = line.targets[0] if isinstance(line, ast.Assign) else None
        target = line.target if isinstance(line, ast.AnnAssign) else target
        if isinstance(target, ast.Name) and target.id in names:
            value = line.value  # type: ignore[attr-defined]  # both kinds have one
            values[target.id] = _literal(value, f"{target.id} in {where}")
    return values


def _literal(node: ast.expr, where: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ConfigError(f"{where} must be a literal: it is parsed, not run") from error
