"""Magnitude pruning: the largest |W| stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.solvers.base import BaseSolver, Found, GroupData
from pipeline.solvers.masks import keep_mask

HELP = "keeps the largest |w|"
# Of a refinement: the choice needs none.
DEFAULTS = {"damping": 0.001, "shrinkage": "estimate"}


class MagnitudeSolver(BaseSolver):
    """Keeps the largest |W|: N of M in every group, or, unstructured, of the whole layer."""

    statistic = "none"
    by_score = True
    rows_held = 6

    @property
    def separable(self) -> bool:
        """False for unstructured: one threshold holds for all rows of a layer."""
        return self.pattern.structured

    def _find(self, original: Tensor, prepared: GroupData) -> Found:
        score = original.abs()
        if self.pattern.structured:
            mask = keep_mask(self.pattern, score)
        else:
            flat = torch.argsort(score.flatten(), stable=True)
            mask = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
            mask[flat[: int(score.numel() * self.pattern.sparsity)]] = False
            mask = mask.view_as(score)
        still = torch.zeros(len(original), device=original.device)
        return Found(original * mask, mask, 1, still)
