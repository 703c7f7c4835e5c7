"""An expert that few calibration tokens were sent to: by which rule it is pruned all the same.

The second moment of n inputs has rank n, and is mostly noise where n is small: a method that
trusts it fits the noise. Below a stated number of tokens the diagonal alone is used.
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
    """What is solved in place of what was asked, and the words for the report."""

    settings: SolverSettings
    statistics: Statistics
    note: str


def least_tokens(block: nn.Module, layers: Iterable[str], asked: int) -> int:
    """Tokens that layers of one input must have seen: `asked`, at least 1, of an expert's; or 0."""
    return 0 if expert_of(block, next(iter(layers))) is None else max(asked, 1)


def simpler_settings(settings: SolverSettings, tokens: float, least: int) -> SolverSettings | None:
    """What an expert of `tokens` tokens is pruned with where those are fewer than `least`.

    None where it is as asked. Otherwise wanda (magnitude where that was asked for) without
    refinement.
    """
    if tokens >= max(least, 1) or not least:
        return None
    by_score = solver_class(settings.method).by_score
    if by_score and settings.refine == "none" and tokens:
        return None
    method = settings.method if by_score else "wanda"
    return SolverSettings(method=method, pattern=settings.pattern, refine="none").resolved()


def fallback(settings: SolverSettings, statistics: Statistics, least: int) -> Fallback | None:
    """What an expert is pruned with that saw fewer than `least` tokens; None if it saw enough.

    least: 0 for a layer that is no expert's. Where no token came at all, all inputs count alike,
    which keeps the largest weights.
    """
    simple = simpler_settings(settings, statistics.tokens, least)
    if simple is None:
        return None
    asked, method = settings.method, simple.method
    if not statistics.tokens:
        diagonal = torch.ones_like(diagonal_of(statistics))
        alike = Statistics(columns=statistics.columns, tokens=1, sequences=1, diagonal=diagonal)
        return Fallback(simple, alike, "largest weights kept: no calibration token")
    diagonal = diagonal_of(statistics).clone()
    own = replace(statistics, diagonal=diagonal, hessian=None, inputs=None)
    asked += "" if settings.refine == "none" else f" with {settings.refine}"
    note = f"{method} instead of {asked}: fewer than {least} calibration tokens"
    return Fallback(simple, own, note)
