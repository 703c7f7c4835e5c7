"""Layer-wise pruning: one solver per method, found by name in ``METHODS``.

All are pure functions of tensors: no files, devices or clocks. ``solver_for(settings)`` gives
an object with ``needs``, ``separable``, ``prepare``, ``solve_group`` and ``solve``; see
``types.Solver``.
"""

from __future__ import annotations

from pipeline.solvers.base import BaseSolver
from pipeline.solvers.choose import RegularizationChoice, choose_regularization
from pipeline.solvers.magnitude import MagnitudeSolver
from pipeline.solvers.objective import objective, relative_error
from pipeline.solvers.pattern import Pattern
from pipeline.solvers.prox_admm import ProxAdmmSolver
from pipeline.solvers.proximal_gradient import ProxSolver
from pipeline.solvers.sparsegpt import SparseGptSolver, auto_blocksize
from pipeline.solvers.types import (
    Solution,
    Solver,
    SolveReport,
    SolverSettings,
    Statistics,
    merge_reports,
)
from pipeline.solvers.wanda import WandaSolver

METHODS: dict[str, type[BaseSolver]] = {
    "magnitude": MagnitudeSolver,
    "wanda": WandaSolver,
    "sparsegpt": SparseGptSolver,
    "prox": ProxSolver,
    "prox_admm": ProxAdmmSolver,
}


def solver_for(settings: SolverSettings) -> BaseSolver:
    """The solver of ``settings.method``. Raises ConfigError on a combination it refuses."""
    return METHODS[settings.method](settings)


__all__ = [
    "METHODS",
    "Pattern",
    "RegularizationChoice",
    "Solution",
    "SolveReport",
    "Solver",
    "SolverSettings",
    "Statistics",
    "auto_blocksize",
    "choose_regularization",
    "merge_reports",
    "objective",
    "relative_error",
    "solver_for",
]
