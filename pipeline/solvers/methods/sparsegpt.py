"""SparseGPT (Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot"): prunes columns from left to right and compensates each error in the columns to its
right.

On a CUDA device a lazy block is one Triton kernel. Elsewhere, and with `kernels` `torch`, it is a
loop over columns in plain torch operations, 15 for each column of a 2:4 pattern.

U is the upper Cholesky factor of the inverse Hessian, U^T U = H^-1, computed in float64. With fp32
factors some choices between close scores differ from those of the reference, and each changes the
rest of its row (one row in 64 on a layer with fewer tokens than columns).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.solvers.base import BaseSolver, GroupData, MethodResult
from pipeline.solvers.cost import OPERATIONS_PER_LAUNCH, MethodCost, SolveCounts
from pipeline.solvers.hessian import raise_damping, require_hessian
from pipeline.solvers.kernels.cholesky import factor_launches, narrow_, upper_factor_
from pipeline.solvers.kernels.on_gpu import triton_module
from pipeline.solvers.masks import PAIRWISE_LIMIT, keep_mask
from pipeline.solvers.types import Statistics

HELP = "column by column, each error moved to the columns on the right"
DEFAULTS = {"damping": 0.01, "shrinkage": 0.0}

# On a CPU: time per column that does not depend on the rows, mostly to start small operations; in
# floating-point operations at the speed of a matrix product (benchmarks/scaling.py).
_OPERATIONS_PER_COLUMN = 8e6
# On a GPU: kernels started for a lazy block, whatever the number of its columns: the Triton kernel
# and the errors' update of the columns on the right, or the threshold and the loop's copies.
_LAUNCHES_PER_BLOCK = 4
# Inside the Triton kernel a column waits for two sums over a row of five shuffles each, a division
# and a product: some 400 cycles at 1.7 GHz (estimated from the instructions' latencies, not
# measured), a twentieth of the time that a launch takes.
_LAUNCHES_OF_A_COLUMNS_WAIT = 0.05
# The factor: C^3 float64 operations. The float64 rate over the fp32 rate, and small steps between
# the products: on a CPU measured, on a GPU from data sheets and `planning.rates`' efficiencies.
_FACTOR_ON_CPU, _FACTOR_ON_GPU = 4.0, 1.4
# Columns in a call of the Triton kernel: wider lazy blocks are cut, because registers end.
_WIDEST_CALL, _CALL = 256, 128


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
    method_settings = ("blocksize", "kernels")

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
        width = self._block_width(columns, weight.device.type)
        solve = self._solve_block
        if weight.device.type == "cuda" and self.settings.kernels == "triton":
            solve = self._solve_block_by_kernel
        for left in range(0, columns, width):
            block = slice(left, min(left + width, columns))
            if not self.pattern.structured and len(weight):
                pivots = prepared.matrix.diagonal()[block]
                mask[:, block] = self._above_threshold(weight[:, block], pivots)
            errors = solve(weight, mask, prepared.matrix, block)
            weight[:, block.stop :].addmm_(errors, prepared.matrix[block, block.stop :], alpha=-1)
        no_change = torch.zeros(len(original), device=original.device)
        return MethodResult(torch.ldexp(weight, exponent), mask, columns, no_change, width)

    def _block_width(self, columns: int, device_type: str) -> int:
        """The lazy block size, rounded up to whole groups: no group may span two blocks."""
        asked = self.settings.blocksize
        width = asked if isinstance(asked, int) else auto_blocksize(columns, device_type)
        return self._whole_groups(width)

    def _whole_groups(self, width: int) -> int:
        group = max(self.pattern.group, 1)
        return -(-width // group) * group

    def _above_threshold(self, local: Tensor, pivots: Tensor) -> Tensor:
        """The mask (R, B) of an unstructured pattern: one threshold for all weights (R, B)."""
        score = (local / pivots).square()
        threshold = score.flatten().sort().values[int(score.numel() * self.pattern.sparsity)]
        return score > threshold

    def _solve_block(self, weight: Tensor, mask: Tensor, upper: Tensor, block: slice) -> Tensor:
        """Prune the columns `block` of `weight` (R, C) in place; returns errors (R, B)."""
        local = weight[:, block].contiguous()
        inner = upper[block, block].contiguous()
        pivots = inner.diagonal()
        keep = mask[:, block]
        group = self.pattern.group
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

    def _solve_block_by_kernel(
        self, weight: Tensor, mask: Tensor, upper: Tensor, block: slice
    ) -> Tensor:
        """`_solve_block` on a GPU: one kernel, or one for each 128 columns of a wide block."""
        width = self._call_width(block.stop - block.start)
        pruned = self.pattern.group - self.pattern.keep
        parts = []
        for left in range(block.start, block.stop, width):
            part = slice(left, min(left + width, block.stop))
            errors = _triton_kernels().prune_block(
                weight[:, part],
                mask[:, part],
                upper[part, part],
                pruned=pruned,
                group=self.pattern.group,
            )
            rest = slice(part.stop, block.stop)
            if rest.start < rest.stop:
                weight[:, rest].addmm_(errors, upper[part, rest], alpha=-1)
            parts.append(errors)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _call_width(self, width: int) -> int:
        """Columns in a call of the kernel, for a lazy block of `width` columns."""
        return width if width <= _WIDEST_CALL else self._whole_groups(_CALL)

    def _launches(self, columns: int) -> float:
        """The time on a GPU that does not depend on the rows, in kernels started."""
        width = self._block_width(columns, "cuda")
        blocks = -(-columns // width)
        each = self._launches_per_column()
        if self.settings.kernels == "triton":
            blocks = max(blocks, -(-columns // self._call_width(width)))
            each = _LAUNCHES_OF_A_COLUMNS_WAIT
        return factor_launches(columns) + _LAUNCHES_PER_BLOCK * blocks + each * columns

    def _launches_per_column(self) -> float:
        """Of `_solve_block`, by counting: 15 for 2:4, 24 for 4:8."""
        group = self.pattern.group
        if not group:
            return 5.0
        # `keep_mask` compares the entries of a group in pairs, or sorts a wide one.
        choice = 6 + group + 2.5 * group * (group - 1) if group <= PAIRWISE_LIMIT else 16
        return 5 + choice / group

    def method_cost(self, columns: int, device: str) -> MethodCost:
        """The factor, updates that cost as much as one product, and a fixed time per column."""
        if device == "cpu":
            fixed = _FACTOR_ON_CPU * columns**3 + _OPERATIONS_PER_COLUMN * columns
        else:
            fixed = _FACTOR_ON_GPU * columns**3 + OPERATIONS_PER_LAUNCH * self._launches(columns)
        return MethodCost(1, fixed)

    def method_counts(self, rows: int, columns: int, device: str) -> SolveCounts:
        """The factor, and the updates: column by column inside a lazy block, then all at once."""
        width = self._block_width(columns, device)
        # Inside a block every column makes a rank-one update of the remaining columns: passes over
        # memory, except in the Triton kernel, which reads and writes a block once.
        passes = width / 2 + 8
        if device != "cpu" and self.settings.kernels == "triton":
            passes = 3
        return SolveCounts(
            # The errors of a block update all columns to its right: R C^2 operations in all.
            other=float(rows) * columns * columns,
            moved=8.0 * rows * columns * passes + 32.0 * columns * columns,
            factor=float(columns) ** 3,
            operators=10 * columns if device == "cpu" else math.ceil(self._launches(columns)),
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


def _triton_kernels() -> Any:
    """The module with the GPU kernel. Raises `ResourceError` where Triton is not installed."""
    return triton_module("sparsegpt_triton")
