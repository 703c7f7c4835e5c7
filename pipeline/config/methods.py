"""The table of pruning methods, and what their files say of them.

A method is one file in `pipeline/solvers/methods/` and one line here. The file holds a solver
class, and above it two literals, `HELP` and `DEFAULTS`. These two are read from its source, as
setuptools reads a version, so that `--help` and the checks of options need no torch.
"""

from __future__ import annotations

import ast
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
"""Name → the solver's class, a `pipeline.solvers.base.BaseSolver`, by its dotted name."""


@dataclass(frozen=True)
class MethodFacts:
    """What is known of a method without its code.

    help: how it prunes, in a line. damping, shrinkage: its regularization where none is given.
    refine, refine_steps: its refinement where none is given, and the steps of that refinement
    where they are not given; None for the refinement's own number of steps.
    """

    help: str
    damping: float
    shrinkage: float | str
    refine: str = "none"
    refine_steps: int | None = None


def method_names() -> tuple[str, ...]:
    """The names of all methods, in the table's order."""
    return tuple(METHODS)


def method_facts(name: str) -> MethodFacts:
    """What the method's file says of it. Raises `ConfigError` for a method that is not there."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}: choose of {', '.join(METHODS)}")
    return _read_facts(METHODS[name].rpartition(".")[0])


def methods_help() -> str:
    """A line on each method, for a help text."""
    return ", ".join(f"{name} ({method_facts(name).help})" for name in METHODS)


def defaults_text(setting: str) -> str:
    """Each method's default of a setting, for a help text: `wanda 0, prox 0.01`."""
    values = {name: getattr(method_facts(name), setting) for name in METHODS}
    return ", ".join(
        f"{name} {value if isinstance(value, str) else format(value, 'g')}"
        for name, value in values.items()
    )


@cache
def _read_facts(module: str) -> MethodFacts:
    """`HELP` and `DEFAULTS` of a module, by its source alone."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the method's module {module} is not there")
    found: dict[str, Any] = {}
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("HELP", "DEFAULTS"):
                found[name] = _literal(node.value, f"{name} in {spec.origin}")
    try:
        return MethodFacts(help=found["HELP"], **found["DEFAULTS"])
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{spec.origin} must have HELP, a string, and DEFAULTS, a dict of MethodFacts' other "
            f"fields: {error}"
        ) from error


def _literal(node: ast.expr, where: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise ConfigError(f"{where} must be a literal: it is read without being run") from error
