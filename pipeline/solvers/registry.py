"""Method name -> solver, by the table in `pipeline.config.methods`."""

from __future__ import annotations

from importlib import import_module

from pipeline.config.methods import METHODS, method_facts
from pipeline.config.solver import SolverSettings
from pipeline.solvers.base import BaseSolver
from pipeline.solvers.cost import SolveCost


def solver_class(method: str) -> type[BaseSolver]:
    """The solver class of `method`. Raises `ConfigError` for an unknown method."""
    method_facts(method)
    module, _, name = METHODS[method].rpartition(".")
    solver: type[BaseSolver] = getattr(import_module(module), name)
    return solver


def solver_for(settings: SolverSettings) -> BaseSolver:
    """The solver of `settings.method`. Raises `ConfigError` for settings it does not support."""
    return solver_class(settings.method)(settings)


def solve_cost(settings: SolverSettings, columns: int, device: str) -> SolveCost:
    """The cost of layers with `columns` inputs on `device`, a torch device type.

    Deterministic: every worker must agree on it.
    """
    return solver_for(settings).cost(columns, device)


def uses_triton(settings: SolverSettings) -> bool:
    """Whether a solve with these settings, resolved, starts Triton kernels on a GPU."""
    return settings.kernels == "triton" and "kernels" in settings.reads()
