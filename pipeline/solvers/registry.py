"""The solver of a method, found by the table in `pipeline.config.methods`."""

from __future__ import annotations

from importlib import import_module

from pipeline.config.methods import METHODS, method_facts
from pipeline.config.solver import SolverSettings
from pipeline.solvers.base import BaseSolver
from pipeline.solvers.cost import SolveCost


def solver_class(method: str) -> type[BaseSolver]:
    """The class that solves by `method`. Raises `ConfigError` for a method that is not there."""
    method_facts(method)
    module, _, name = METHODS[method].rpartition(".")
    found: type[BaseSolver] = getattr(import_module(module), name)
    return found


def solver_for(settings: SolverSettings) -> BaseSolver:
    """The solver of ``settings.method``. Raises ConfigError on a combination it refuses."""
    return solver_class(settings.method)(settings)


def solve_cost(settings: SolverSettings, columns: int) -> SolveCost:
    """The cost for layers with `columns` inputs. Deterministic: every worker must agree on it."""
    return solver_for(settings).cost(columns)
