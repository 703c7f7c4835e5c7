"""A lazy block of SparseGPT as one kernel on a GPU, in Triton.

A program takes a few rows of the block into registers and goes through the columns from left to
right, as the loop of `methods.sparsegpt` does, with the same operations in the same order:
divisions are rounded correctly, and products and differences are not fused. Rows do not depend on
each other, so the result does not depend on how they are divided among programs, calls or workers.

A column of a tile in registers cannot be addressed. It is extracted by a sum along the row in which
all other terms are zero, which is exact. A row of up to 512 columns lies in
one warp, so that the sum is five shuffles and no barrier.

This module imports Triton; `on_gpu` imports this module only where it is used.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

# Entries of the tile of a warp: 16 registers of each thread. Registers do not spill, and many
# programs fit on a multiprocessor, which hides the latency of a column.
_TILE = 512
_MOST_WARPS = 32


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _choose(tile, squares, column, keep, at, PRUNED: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """`keep`; where a group begins at column `at`, with all but its PRUNED lowest scores chosen."""
    if at % GROUP == 0:
        score = tl.div_rn(tile * tile, squares)
        rank = tl.zeros_like(tile).to(tl.int32)
        for other in range(at, at + GROUP):
            rival = tl.sum(tl.where(column == other, score, 0.0), axis=1)[:, None]
            # Among equals the later column ranks higher, as in `masks.keep_mask`.
            above = tl.where(column > other, score >= rival, score > rival)
            rank += above.to(tl.int32)
        here = (column >= at) & (column < at + GROUP)
        keep = tl.where(here, rank >= PRUNED, keep)
    return keep


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _block(  # type: ignore[no-untyped-def]
    weight,
    mask,
    errors,
    upper,
    rows,
    width,
    weight_stride,
    mask_stride,
    upper_stride,
    PRUNED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program: ROWS rows of a block of `width` columns. GROUP 0: the mask is given."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < width)
    # Only the offset of a row can exceed 2³¹.
    row = row.to(tl.int64)
    weights, masks = weight + row * weight_stride + column, mask + row * mask_stride + column
    # A pruned entry's place in the tile takes its error: its weight is 0.
    tile = tl.load(weights, mask=inside, other=0.0)
    diagonal = upper + column.to(tl.int64) * (upper_stride + 1)
    pivots = tl.load(diagonal, mask=column < width, other=1.0)
    squares = pivots * pivots
    # Of an N:M pattern it is overwritten group by group.
    keep = tl.load(masks, mask=inside, other=0) != 0
    line = upper
    for at in range(width):
        if GROUP:
            keep = _choose(tile, squares, column, keep, at, PRUNED, GROUP)
        pruned = (column == at) & (keep == 0)
        value = tl.sum(tl.where(pruned, tile, 0.0), axis=1)[:, None]
        right = (column > at) & (column < width)
        factors = tl.load(line + column, mask=right, other=0.0)
        error = tl.div_rn(value, tl.load(line + at))
        tile = tl.where(pruned, error, tile - error * factors)
        line += upper_stride
    tl.store(errors + row * width + column, tl.where(keep, 0.0, tile), mask=inside)
    tl.store(weights, tl.where(keep, tile, 0.0), mask=inside)
    if GROUP:
        tl.store(masks, keep, mask=inside)


def tile_of(width: int) -> tuple[int, int, int]:
    """Rows and padded columns of a program's tile, and its warps, for blocks of `width` columns."""
    padded = max(triton.next_power_of_2(width), 4)
    rows = max(1, _TILE // padded)
    return rows, padded, min(max(1, padded // _TILE), _MOST_WARPS)


def prune_block(
    weight: Tensor,
    mask: Tensor,
    upper: Tensor,
    *,
    pruned: int,
    group: int,
    rows: int | None = None,
) -> Tensor:
    """Prune a lazy block: weights and mask in place.

    Args:
        weight: (R, B) fp32 on a GPU, a slice of columns. On return it has the pruned weights.
        mask: (R, B) bool, a slice of columns, True where a weight is kept: given if `group` is 0,
            chosen here otherwise.
        upper: (B, B) fp32, the slice on the diagonal of the upper factor of the inverse Hessian.
        pruned, group: of an N:M pattern, M - N and M; M divides B. 0 for a given mask.
        rows: rows of a program, a power of two, for tests.

    Returns:
        (R, B) fp32, the errors (w - q) / U_ii, 0 where a weight is kept.
    """
    count, columns = weight.shape
    errors = torch.empty((count, columns), dtype=weight.dtype, device=weight.device)
    tile_rows, padded, warps = tile_of(columns)
    tile_rows = rows or tile_rows
    with torch.cuda.device(weight.device):
        _block[(triton.cdiv(count, tile_rows),)](
            weight,
            mask,
            errors,
            upper,
            count,
            columns,
            weight.stride(0),
            mask.stride(0),
            upper.stride(0),
            PRUNED=pruned,
            GROUP=group,
            ROWS=tile_rows,
            WIDTH=padded,
            num_warps=warps,
            # A product rounded before it is subtracted, as the CPU's rank-one update does.
            enable_fp_fusion=False,
        )
    return errors
