"""Wanda (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models")."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.solvers.base import BaseSolver, Found, GroupData
from pipeline.solvers.regularize import diagonal_of


class WandaSolver(BaseSolver):
    """Keeps the largest |W_ij| * sqrt(H_jj), in every group or in every row; weights stay.

    The diagonal is undamped, also where a refinement after it is damped.
    """

    _needs = "diagonal"

    def _find(self, original: Tensor, prepared: GroupData) -> Found:
        assert prepared.statistics is not None
        norms = (diagonal_of(prepared.statistics) / prepared.statistics.tokens).sqrt()
        # A power of two per row changes no comparison, and keeps 1e30 * 1e15 in range.
        exponent = torch.frexp(original.abs().amax(dim=1, keepdim=True)).exponent
        score = torch.ldexp(original.abs(), -exponent) * norms
        mask = self.pattern.keep_mask(score)
        still = torch.zeros(len(original), device=original.device)
        return Found(original * mask, mask, 1, still)
