"""``--shrinkage auto``: the regularization of a group chosen on two halves of the calibration.

A few settings are solved on the statistics of one half and judged on the other: the estimate
made from the counts (regularize.estimate), weaker and stronger ones, and Wanda, which is what
full shrinkage means. What is carried over to the whole is the factor on the estimate, which
itself knows that there are twice as many tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.config.solver import SolverSettings
from pipeline.solvers.hessian import estimate, joined
from pipeline.solvers.methods.prox_admm import ProxAdmmSolver
from pipeline.solvers.methods.wanda import WandaSolver
from pipeline.solvers.objective import objective
from pipeline.solvers.types import Statistics, percentage

# Factors on the estimated (damping, shrinkage), in the order in which they are tried.
_FACTORS = ((1.0, 1.0), (0.2, 0.2), (1.0, 4.0), (4.0, 1.0), (0.2, 1.0), (0.05, 0.05))
# A trial: one inverse, few iterations, and one row in eight.
# Of the solve; the rest up to a quarter goes to the estimates and the judging.
_TRIAL_SHARE = 0.15
_TRIAL_ITERATIONS, _ROW_SHARE, _LEAST_ROWS = 20, 8, 16


@dataclass(frozen=True)
class Trial:
    """One setting solved on a half of the calibration; relative error in percent on the other."""

    damping: float
    shrinkage: float
    damping_factor: float
    shrinkage_factor: float
    relative_error: float


@dataclass(frozen=True)
class RegularizationChoice:
    """Damping and shrinkage for a group, to be put in its settings, and the trials behind them."""

    damping: float
    shrinkage: float
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values; ``damping`` and ``shrinkage`` are fields of the settings."""
        return {**asdict(self), "trials": [asdict(trial) for trial in self.trials]}


def choose_regularization(
    weights: Mapping[str, Tensor],
    halves: tuple[Statistics, Statistics],
    settings: SolverSettings,
) -> RegularizationChoice:
    """Choose damping and shrinkage for layers that share an input.

    weights: name -> (R_i, C), all rows of every layer of the group, so that every rank that asks
    gets the same answer. halves: full statistics of two halves of the calibration sequences.
    The trials cost at most about a quarter of a solve: where the rows are few beside the columns,
    fewer settings are tried. Where Wanda is better than all of them, the choice is full shrinkage.
    Raises NumericalError as a solve would.
    """
    rows = _sample(weights)
    total = sum(len(weight) for weight in weights.values())
    fit, judge = halves
    damping, shrinkage = estimate(fit)
    zero = float(objective(torch.zeros_like(rows), rows, judge).sum())

    def held_out(solver: ProxAdmmSolver | WandaSolver) -> float:
        solved = solver.weights(rows, solver.prepare(fit))
        return percentage(float(objective(solved, rows, judge).sum()), zero)

    wanda = WandaSolver(SolverSettings(method="wanda", pattern=settings.pattern))
    trials = [Trial(0.0, 1.0, 0.0, 0.0, held_out(wanda))]
    for by_damping, by_shrinkage in _FACTORS[
        : _affordable(total, len(rows), fit.columns, settings)
    ]:
        tried = (by_damping * damping, min(by_shrinkage * shrinkage, 1.0))
        error = held_out(ProxAdmmSolver(_trial_settings(settings, *tried)))
        trials.append(Trial(*tried, by_damping, by_shrinkage, error))
    best = min(trials, key=lambda trial: trial.relative_error)
    if best is trials[0]:
        return RegularizationChoice(0.0, 1.0, tuple(trials))
    damping, shrinkage = estimate(joined(*halves))
    return RegularizationChoice(
        best.damping_factor * damping, min(best.shrinkage_factor * shrinkage, 1.0), tuple(trials)
    )


def _sample(weights: Mapping[str, Tensor]) -> Tensor:
    """Every eighth row of every layer, at least 16 rows of the group: (R', C) fp32."""
    total = sum(len(weight) for weight in weights.values())
    step = max(1, min(_ROW_SHARE, total // _LEAST_ROWS))
    return torch.cat([weight.detach()[::step].float() for weight in weights.values()])


def _affordable(total: int, sampled: int, columns: int, settings: SolverSettings) -> int:
    """How many trials the share of a solve pays for, at least one; in units of one inverse."""
    solve = 2 + total / columns * (settings.admm_iterations + 14)
    products = _TRIAL_ITERATIONS + 4
    trial = 1 + sampled / columns * products
    return min(len(_FACTORS), max(1, int(_TRIAL_SHARE * solve / trial)))


def _trial_settings(settings: SolverSettings, damping: float, shrinkage: float) -> SolverSettings:
    """A short prox_admm: one inverse at a strong penalty, lambda to the same end in fewer steps."""
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
