"""A pruning method as someone would add it: this file, and one line in the table of methods."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.solvers.base import BaseSolver, GroupData, MethodResult
from pipeline.solvers.masks import keep_mask

HELP = "keeps what lies furthest to the right"
DEFAULTS = {"damping": 0.25, "shrinkage": 0.0, "refine": "cg", "refine_steps": 3}


class RightmostSolver(BaseSolver):
    """Keeps the last N of every M columns, whatever their weights."""

    statistic = "none"
    by_score = True

    def _find(self, original: Tensor, prepared: GroupData) -> MethodResult:
        column = torch.arange(original.shape[1], device=original.device, dtype=torch.float32)
        mask = keep_mask(self.pattern, column.expand_as(original))
        no_change = torch.zeros(len(original), device=original.device)
        return MethodResult(original * mask, mask, 1, no_change)
