"""SparseGPT (Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot"): prunes columns from left to right and compensates each error in the columns to its
right.

U is the upper Cholesky factor of the inverse Hessian, U^T U = H^-1, computed in float64. With fp32
factors some choices between close scores differ from those of the reference, and each changes the
rest of its row (one row in 64 on a layer with fewer tokens than columns).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.solvers.base import BaseSolver, GroupData, MethodResult
from pipeline.solvers.cost import MethodCost, SolveCounts
from pipeline.solvers.hessian import raise_damping, require_hessian
from pipeline.solvers.kernels.cholesky import narrow_, upper_factor_
from pipeline.solvers.masks import keep_mask
from pipeline.solvers.types import Statistics

HELP = "column by column, each error moved to the columns on the right"
DEFAULTS = {"damping": 0.01, "shrinkage": 0.0}

# Time per column that does not depend on the rows, mostly to start small operations; in
# floating-point operations at the speed of a matrix product.
_OPERATIONS_PER_COLUMN = 8e6


def auto_blocksize(columns: int, device_type: str) -> int:
    """The lazy block size of `--blocksize auto` for a layer with `columns` inputs.

    A fixed rule from measurements (benchmarks/lazy_update.py), so that all workers and all resumes
    agree. On a CPU about C^0.6, a multiple of 16: within 15 % of the best time for C of 256 to
    2048. Elsewhere 128, as in the reference implementation.
    """
    if device_type != "cpu":
        return 128
    return min(max(round(math.pow(columns, 0.6) / 16) * 16, 32), 512)


class SparseGptSolver(BaseSolver):
    """SparseGPT with lazy blocks of `blocksize` columns.

    N:M patterns choose within each group; unstructured ones by one threshold per block over all
    rows. Memory beyond the Hessian: the float64 factor, rounded to fp32 in place (the bytes of two
    C x C fp32 per group), and two (R, C) fp32. Time: C^3 operations per group, R C^2 per layer.
    """

    writes_hessian = True
    # Every column starts a few small operators, which do not take much longer for more rows.
    least_rows = 1024
    rows_held = 5
    method_settings = ("blocksize",)

    @property
    def separable(self) -> bool:
        """False for an unstructured pattern: the threshold of a block is that of all rows."""
        return self.pattern.structured

    def _derive(self, prepared: GroupData) -> GroupData:
        problem = prepared.problem
        assert problem is not None
        while True:
            factor = _reference_hessian(problem.statistics, problem.damping, problem.shrinkage)
            if bool(upper_factor_(factor)):
                return replace(prepared, problem=problem, matrix=narrow_(factor))
            problem = raise_damping(problem)

    def _find(self, original: Tensor, prepared: GroupData) -> MethodResult:
        assert prepared.problem is not None
        assert prepared.matrix is not None
        # Scaling by a power of two changes no comparison or rounding, and keeps squares in range.
        peak = original.abs().amax(dim=1, keepdim=True)
        if not self.pattern.structured and len(original):
            peak = peak.amax(dim=0, keepdim=True)
        exponent = torch.frexp(peak).exponent
        weight = torch.ldexp(original, -exponent)
        weight *= prepared.problem.live
        mask = torch.empty_like(weight, dtype=torch.bool)
        columns = weight.shape[1]
        width = self._block_width(original)
        for left in range(0, columns, width):
            block = slice(left, min(left + width, columns))
            errors = self._solve_block(weight, mask, prepared.matrix, block)
            weight[:, block.stop :].addmm_(errors, prepared.matrix[block, block.stop :], alpha=-1)
        no_change = torch.zeros(len(original), device=original.device)
        return MethodResult(torch.ldexp(weight, exponent), mask, columns, no_change, width)

    def _block_width(self, weight: Tensor) -> int:
        """The lazy block size, rounded up to whole groups: no group may span two blocks."""
        asked = self.settings.blocksize
        columns, kind = weight.shape[1], weight.device.type
        width = asked if isinstance(asked, int) else auto_blocksize(columns, kind)
        group = max(self.pattern.group, 1)
        return -(-width // group) * group

    def _solve_block(self, weight: Tensor, mask: Tensor, upper: Tensor, block: slice) -> Tensor:
        """Prune the columns `block` of `weight` (R, C) in place; returns errors (R, B)."""
        local = weight[:, block].contiguous()
        inner = upper[block, block].contiguous()
        pivots = inner.diagonal()
        keep = mask[:, block]
        group = self.pattern.group
        if not group and len(local):
            score = (local / pivots).square()
            threshold = score.flatten().sort().values[int(score.numel() * self.pattern.sparsity)]
            keep.copy_(score > threshold)
        errors = torch.empty_like(local)
        for column in range(local.shape[1]):
            if group and column % group == 0:
                span = slice(column, column + group)
                keep[:, span] = keep_mask(self.pattern, local[:, span].square() / pivots[span] ** 2)
            pruned = local[:, column] * ~keep[:, column]
            error = (pruned / pivots[column]).unsqueeze(1)
            local[:, column:].addmm_(error, inner[column : column + 1, column:], alpha=-1)
            errors[:, column] = error.squeeze(1)
        weight[:, block] = local * keep
        return errors

    def method_cost(self, columns: int) -> MethodCost:
        """The factor, updates that cost as much as one product, and a fixed time per column."""
        return MethodCost(1, 4.0 * columns**3 + _OPERATIONS_PER_COLUMN * columns)

    def method_counts(self, rows: int, columns: int, device: str) -> SolveCounts:
        """The factor, and the updates: column by column inside a lazy block, then all at once."""
        asked = self.settings.blocksize
        width = asked if isinstance(asked, int) else auto_blocksize(columns, device)
        return SolveCounts(
            # The errors of a block update all columns to its right: R C^2 operations in all.
            other=float(rows) * columns * columns,
            # Inside a block every column makes a rank-one update of the remaining columns.
            moved=8.0 * rows * columns * (width / 2 + 8) + 32.0 * columns * columns,
            factor=float(columns) ** 3,
            operators=10 * columns,
        )

    def matrix_bytes(self, columns: float) -> float:
        """The factor in float64."""
        return 8.0 * columns * columns

    def matrix_bytes_of_inputs(self, rows: int, columns: float, inputs: float) -> float:
        """The Hessian computed from the inputs, in fp32 and float64."""
        return 12.0 * columns * columns


def _reference_hessian(statistics: Statistics, damping: float, shrinkage: float) -> Tensor:
    """H as the reference implementation regularizes it, (C, C) float64.

    The sum of x x^T is multiplied by 2 / sequences, and the diagonal of dead columns set to 1,
    before the damping is computed from its mean. The scale matters: it decides the weight of those
    ones in the damping.
    """
    scale = 2 / max(statistics.sequences, 1)
    hessian = require_hessian(statistics).double()
    diagonal = hessian.diagonal() * scale
    diagonal = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal))
    hessian.mul_(scale * (1 - shrinkage))
    hessian.diagonal().copy_(diagonal + damping * diagonal.mean())
    return hessian
