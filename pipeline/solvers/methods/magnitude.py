"""Magnitude pruning: keeps the largest |W|, without changing their values."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.solvers.base import BaseSolver, GroupData, MethodResult
from pipeline.solvers.masks import keep_mask

HELP = "keeps the largest |w|"
# Used by a refinement only: choosing the mask needs no Hessian.
DEFAULTS = {"damping": 0.001, "shrinkage": "estimate"}


class MagnitudeSolver(BaseSolver):
    """Keeps the largest |W|: N of M in every group, or those of the whole layer (unstructured)."""

    statistic = "none"
    by_score = True
    rows_held = 6

    @property
    def separable(self) -> bool:
        """False for an unstructured pattern: one threshold for all rows of a layer."""
        return self.pattern.structured

    def _find(self, original: Tensor, prepared: GroupData) -> MethodResult:
        score = original.abs()
        if self.pattern.structured:
            mask = keep_mask(self.pattern, score)
        else:
            flat = torch.argsort(score.flatten(), stable=True)
            mask = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
            mask[flat[: int(score.numel() * self.pattern.sparsity)]] = False
            mask = mask.view_as(score)
        no_change = torch.zeros(len(original), device=original.device)
        return MethodResult(original * mask, mask, 1, no_change)
