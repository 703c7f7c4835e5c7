"""Wanda (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models")."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.solvers.base import BaseSolver, Found, GroupData
from pipeline.solvers.hessian import diagonal_of
from pipeline.solvers.masks import keep_mask

HELP = "keeps the largest |w| · ‖x‖"
# Of a refinement: the choice needs none.
DEFAULTS = {"damping": 0.001, "shrinkage": "estimate"}


class WandaSolver(BaseSolver):
    """Keeps the largest |W_ij| * sqrt(H_jj), in every group or in every row; weights stay.

    The diagonal is undamped, also where a refinement after it is damped.
    """

    statistic = "diagonal"
    by_score = True
    rows_held = 7

    def _find(self, original: Tensor, prepared: GroupData) -> Found:
        assert prepared.statistics is not None
        norms = (diagonal_of(prepared.statistics) / prepared.statistics.tokens).sqrt()
        # A power of two per row changes no comparison, and keeps 1e30 * 1e15 in range.
        exponent = torch.frexp(original.abs().amax(dim=1, keepdim=True)).exponent
        score = torch.ldexp(original.abs(), -exponent) * norms
        mask = keep_mask(self.pattern, score)
        still = torch.zeros(len(original), device=original.device)
        return Found(original * mask, mask, 1, still)
