"""How an expert is pruned that few calibration tokens were routed to.

The second moment of n inputs has rank n at most. If n is small it is mostly noise, and a method
that relies on it fits the noise. Below a stated number of tokens (`--expert-tokens`) only the
diagonal is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from pipeline.config.solver import SolverSettings
from pipeline.models.experts import expert_of
from pipeline.solvers.hessian import diagonal_of
from pipeline.solvers.registry import solver_class
from pipeline.solvers.types import Statistics


@dataclass(frozen=True)
class Fallback:
    """Settings and statistics that replace the requested ones, and a note for the report."""

    settings: SolverSettings
    statistics: Statistics
    note: str


def least_tokens(block: nn.Module, layers: Iterable[str], expert_tokens: int) -> int:
    """Fewest tokens with which layers of one group are solved as requested.

    For an expert's layers `expert_tokens`, at least 1; 0 for other layers.
    """
    return 0 if expert_of(block, next(iter(layers))) is None else max(expert_tokens, 1)


def simpler_settings(settings: SolverSettings, tokens: float, least: int) -> SolverSettings | None:
    """The settings of an expert with `tokens` tokens; None if `settings` apply unchanged.

    With fewer than `least` tokens: wanda (magnitude if that was requested), without refinement.
    """
    if tokens >= max(least, 1) or not least:
        return None
    by_score = solver_class(settings.method).by_score
    if by_score and settings.refine == "none" and tokens:
        return None
    method = settings.method if by_score else "wanda"
    return SolverSettings(method=method, pattern=settings.pattern, refine="none").resolved()


def fallback(settings: SolverSettings, statistics: Statistics, least: int) -> Fallback | None:
    """How to prune an expert with fewer than `least` tokens; None if it has enough.

    least: 0 for a layer that is not an expert's. Without any token the diagonal is all ones, which
    keeps the largest weights.
    """
    simple = simpler_settings(settings, statistics.tokens, least)
    if simple is None:
        return None
    requested, method = settings.method, simple.method
    if not statistics.tokens:
        diagonal = torch.ones_like(diagonal_of(statistics))
        uniform = Statistics(columns=statistics.columns, tokens=1, sequences=1, diagonal=diagonal)
        return Fallback(simple, uniform, "largest weights kept: no calibration token")
    diagonal = diagonal_of(statistics).clone()
    diagonal_only = replace(statistics, diagonal=diagonal, hessian=None, inputs=None)
    requested += "" if settings.refine == "none" else f" with {settings.refine}"
    note = f"{method} instead of {requested}: fewer than {least} calibration tokens"
    return Fallback(simple, diagonal_only, note)
