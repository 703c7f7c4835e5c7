"""`--shrinkage auto`: chooses the regularization of a group on two halves of the calibration.

A few settings are solved on the statistics of one half and evaluated on the other half: the
estimate (`hessian.estimate`), weaker and stronger ones, and Wanda, which equals full shrinkage.
The result is the best factors on the estimate, applied to the estimate from all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config.solver import SolverSettings
from pipeline.solvers.hessian import dead_inputs, estimate, joined
from pipeline.solvers.methods.prox_admm import ProxAdmmSolver
from pipeline.solvers.methods.wanda import WandaSolver
from pipeline.solvers.objective import objective
from pipeline.solvers.types import Statistics

# Factors on the estimated (damping, shrinkage), in the order in which they are tried.
_FACTORS = ((1.0, 1.0), (0.2, 0.2), (1.0, 4.0), (4.0, 1.0), (0.2, 1.0), (0.05, 0.05))
# Time of all trials as a share of the solve. With estimates and evaluation it is about a quarter.
_TRIAL_SHARE = 0.15
NOT_COMPARED = (
    "shrinkage estimate instead of auto: the inputs or outputs are 0 on a half of the calibration"
)
"""The deviation where `choose_regularization` could compare nothing."""
# A trial has one inverse, few iterations, and one row in eight.
_TRIAL_ITERATIONS, _ROW_SHARE, _LEAST_ROWS = 20, 8, 16


@dataclass(frozen=True)
class Trial:
    """One setting, solved on one half of the calibration.

    damping_factor, shrinkage_factor: its factors on the estimate. relative_error: on the other
    half, in percent.
    """

    damping: float
    shrinkage: float
    damping_factor: float
    shrinkage_factor: float
    relative_error: float


@dataclass(frozen=True)
class RegularizationChoice:
    """The damping and shrinkage chosen for a group, and the trials they were chosen from."""

    damping: float
    shrinkage: float
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict of JSON values."""
        return {**asdict(self), "trials": [asdict(trial) for trial in self.trials]}


def choose_regularization(
    weights: Mapping[str, Tensor],
    halves: tuple[Statistics, Statistics],
    settings: SolverSettings,
) -> RegularizationChoice | None:
    """Choose damping and shrinkage for layers that share an input.

    weights: name -> (R_i, C), all rows of all layers of the group, so that the choice does not
    depend on the worker. halves: full statistics of the two halves of the calibration sequences.
    The trials take at most about a quarter of the time of a solve: with few rows compared with the
    columns, fewer settings are tried. If Wanda is the best of all, the choice is full shrinkage.
    None where nothing can be compared: the inputs or outputs are 0 on a half of the calibration.
    Raises NumericalError as a solve does.
    """
    rows = _sample(weights)
    total = sum(len(weight) for weight in weights.values())
    fit, held_out = halves
    damping, shrinkage = estimate(fit)
    zero = float(objective(torch.zeros_like(rows), rows, held_out).sum())
    if zero <= 0 or dead_inputs(fit) == fit.columns:
        return None

    def held_out_error(solver: ProxAdmmSolver | WandaSolver) -> float:
        solved = solver.weights(rows, solver.prepare(fit))
        return 100 * float(objective(solved, rows, held_out).sum()) / zero

    wanda = WandaSolver(SolverSettings(method="wanda", pattern=settings.pattern))
    trials = [Trial(0.0, 1.0, 0.0, 0.0, held_out_error(wanda))]
    for by_damping, by_shrinkage in _FACTORS[
        : _affordable(total, len(rows), fit.columns, settings, rows.device.type)
    ]:
        tried = (by_damping * damping, min(by_shrinkage * shrinkage, 1.0))
        error = held_out_error(ProxAdmmSolver(_trial_settings(settings, *tried)))
        trials.append(Trial(*tried, by_damping, by_shrinkage, error))
    best = min(trials, key=lambda trial: trial.relative_error)
    if best is trials[0]:
        return RegularizationChoice(0.0, 1.0, tuple(trials))
    damping, shrinkage = estimate(joined(*halves))
    return RegularizationChoice(
        best.damping_factor * damping, min(best.shrinkage_factor * shrinkage, 1.0), tuple(trials)
    )


def _sample(weights: Mapping[str, Tensor]) -> Tensor:
    """Every eighth row of every layer, or more so that the group has 16 rows: (R', C) fp32."""
    total = sum(len(weight) for weight in weights.values())
    step = max(1, min(_ROW_SHARE, total // _LEAST_ROWS))
    return torch.cat([weight.detach()[::step].float() for weight in weights.values()])


def _affordable(
    total: int, sampled: int, columns: int, settings: SolverSettings, device: str
) -> int:
    """How many trials fit into `_TRIAL_SHARE` of a solve, at least one.

    total, sampled: rows of the group, and of a trial. device: a torch device type. Times on a CPU
    are in units of one inverse.
    """
    if device == "cuda":
        whole, short = replace(settings, method="prox_admm"), _trial_settings(settings, 0.1, 0.1)
        solve, trial = (
            ProxAdmmSolver(each).cost(columns, device).of(rows)
            for each, rows in ((whole, total), (short, sampled))
        )
    else:
        solve = 2 + total / columns * (settings.admm_iterations + 14)
        products = _TRIAL_ITERATIONS + 4
        trial = 1 + sampled / columns * products
    return min(len(_FACTORS), max(1, int(_TRIAL_SHARE * solve / trial)))


def _trial_settings(settings: SolverSettings, damping: float, shrinkage: float) -> SolverSettings:
    """A short prox_admm: one inverse at a large rho, and lambda grows to the same end faster."""
    end = settings.admm_lambda * settings.admm_lambda_growth ** (settings.admm_iterations)
    return replace(
        settings,
        method="prox_admm",
        damping=damping,
        shrinkage=shrinkage,
        refine="none",
        admm_iterations=_TRIAL_ITERATIONS,
        admm_first_iterations=_TRIAL_ITERATIONS,
        admm_rho=1.0,
        admm_lambda_growth=(end / settings.admm_lambda) ** (1 / _TRIAL_ITERATIONS),
    )
