"""Wanda (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models")."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.solvers.base import BaseSolver, GroupData, MethodResult
from pipeline.solvers.hessian import diagonal_of
from pipeline.solvers.masks import keep_mask

HELP = "keeps the largest |w| · ‖x‖"
# Used by a refinement only: choosing the mask uses the undamped diagonal.
DEFAULTS = {"damping": 0.001, "shrinkage": "estimate"}


class WandaSolver(BaseSolver):
    """Keeps the largest |W_ij| * sqrt(H_jj) of every group or row, without changing their values.

    The diagonal is undamped, even where a refinement that follows is damped.
    """

    statistic = "diagonal"
    by_score = True
    rows_held = 7

    def _find(self, original: Tensor, prepared: GroupData) -> MethodResult:
        assert prepared.statistics is not None
        norms = (diagonal_of(prepared.statistics) / prepared.statistics.tokens).sqrt()
        # Scaling a row by a power of two changes no comparison, and prevents overflow.
        exponent = torch.frexp(original.abs().amax(dim=1, keepdim=True)).exponent
        score = torch.ldexp(original.abs(), -exponent) * norms
        mask = keep_mask(self.pattern, score)
        no_change = torch.zeros(len(original), device=original.device)
        return MethodResult(original * mask, mask, 1, no_change)
