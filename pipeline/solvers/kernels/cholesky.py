"""Inverse and inverse factor of a matrix in place, from matrix products and small Cholesky factors.

Why not always the library functions: cuSOLVER copies the matrix and allocates workspace
(`cholesky_inverse` on CUDA holds three C x C buffers), and at C = 28,672 each buffer is 3.3 GB.
These functions use the given buffer and O(C * _BLOCK) more, and run at the speed of matrix
products, on CPU and CUDA.

`invert_`, `invert_blocks_` and `upper_factor_` return a 0-d bool tensor on the device of the
matrix: True where it was positive definite to working precision. The caller decides when to wait
for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 512
# Rows of a stripe of the lower triangle: narrow ones leave fewer entries above the diagonal that
# are computed for nothing, wide ones are larger products.
_STRIPE = 1024
_BLOCK_FLOAT64 = 256
# LAPACK's 32-bit integers count the entries of a column block.
_LAPACK_LIMIT = 32_767


def _bounds(columns: int, width: int = _BLOCK) -> list[slice]:
    return [slice(at, min(at + width, columns)) for at in range(0, columns, width)]


def invert_(matrix: Tensor) -> Tensor:
    """Replace a symmetric positive definite (C, C) by its inverse; returns whether it was definite.

    On a CPU by LAPACK, which works in place on a matrix in column order; elsewhere by
    `invert_blocks_`. C^3 operations.
    """
    on_cpu = matrix.device.type == "cpu" and matrix.is_contiguous()
    if not on_cpu or matrix.shape[0] > _LAPACK_LIMIT:
        return invert_blocks_(matrix)
    # The transpose of a symmetric matrix is the same matrix, in column order.
    matrix, info = matrix.T, torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    if int(info):
        return info == 0
    torch.cholesky_inverse(matrix, out=matrix)
    return torch.isfinite(matrix.diagonal()).all()


def invert_blocks_(matrix: Tensor) -> Tensor:
    """`invert_` by matrix products and small Cholesky factors, on any device.

    The block sweep (Gauss-Jordan) of a symmetric matrix. Sweeping block k, with P the inverse of
    its pivot block, replaces the pivot by -P, multiplies its row and column by P, and subtracts
    A_rk P A_kr from the rest. After all blocks the matrix is minus the inverse. Each pivot is a
    Schur complement of a positive definite matrix, so no rows have to be exchanged.
    The matrix stays symmetric, so only its lower triangle is read and swept, in stripes of rows;
    the upper one is copied from it in the end. About C^3 operations (`sweep_operations`). Extra
    memory: two C x 512 panels.
    """
    sound = torch.ones((), dtype=torch.bool, device=matrix.device)
    rows = matrix.shape[0]
    blocks, stripes = _bounds(rows), _bounds(rows, _STRIPE)
    for block in blocks:
        factor, info = torch.linalg.cholesky_ex(matrix[block, block])
        sound &= info == 0
        pivot = torch.cholesky_inverse(factor)
        column = matrix.new_empty(rows, block.stop - block.start)
        column[: block.start] = matrix[block, : block.start].T
        column[block] = 0  # the rows of the pivot are overwritten below
        column[block.stop :] = matrix[block.stop :, block]
        scaled = column @ pivot
        for stripe in stripes:
            left = slice(0, stripe.stop)
            matrix[stripe, left].addmm_(scaled[stripe], column[left].T, alpha=-1)
        matrix[block, : block.start] = scaled[: block.start].T
        matrix[block.stop :, block] = scaled[block.stop :]
        matrix[block, block] = -pivot
    matrix.neg_()
    for block in blocks:
        matrix[: block.start, block] = matrix[block, : block.start].T
    return sound & torch.isfinite(matrix.diagonal()).all()


def sweep_operations(columns: int) -> float:
    """Operations of the products of `invert_blocks_` for C columns: C^3 and what is wasted."""
    area = sum(2.0 * (each.stop - each.start) * each.stop for each in _bounds(columns, _STRIPE))
    widths: list[int] = [each.stop - each.start for each in _bounds(columns)]
    return float(sum(area * width + 2.0 * columns * width * width for width in widths))


def sweep_launches(columns: int) -> int:
    """Kernels that `invert_blocks_` starts on a GPU for C columns, by counting."""
    blocks, stripes = -(-columns // _BLOCK), -(-columns // _STRIPE)
    return blocks * (stripes + 15) + 5


def upper_factor_(matrix: Tensor) -> Tensor:
    """Replace a symmetric positive definite A (C, C) by upper triangular U with U^T U = A^-1.

    A = R R^T with R upper triangular is the Cholesky recurrence from the last column to the first;
    then U = R^-1. Neither A^-1 nor a second C x C is formed. Only the upper triangle is read; the
    strict lower one is set to 0. C^3 operations. Returns whether the matrix was positive definite.
    """
    sound = torch.ones((), dtype=torch.bool, device=matrix.device)
    bounds = _bounds(matrix.shape[0], _BLOCK_FLOAT64)
    for index, block in reversed(list(enumerate(bounds))):
        factor, info = torch.linalg.cholesky_ex(matrix[block, block].T.flip(0, 1))
        sound &= info == 0
        factor = factor.flip(0, 1)
        matrix[block, block] = factor
        matrix[block, : block.start] = 0
        above = matrix[: block.start, block]
        # X R_kk^T = A_above is R_kk X^T = A_above^T.
        panel = torch.linalg.solve_triangular(factor, above.T, upper=True).T.contiguous()
        matrix[: block.start, block] = panel
        for left in bounds[:index]:  # only the upper triangle, one panel at a time
            matrix[: left.stop, left].addmm_(panel[: left.stop], panel[left].T, alpha=-1)
    _invert_upper_(matrix, bounds)
    return sound & torch.isfinite(matrix.diagonal()).all()


def factor_launches(columns: int) -> int:
    """Kernels that `upper_factor_` and `narrow_` start on a GPU for C columns, by counting."""
    blocks = -(-columns // _BLOCK_FLOAT64)
    return blocks * (blocks - 1) // 2 + 17 * blocks + 8


def _invert_upper_(matrix: Tensor, bounds: list[slice]) -> None:
    """Replace upper triangular R by its inverse X, from the last row block to the first.

    Row block i of X is X_ii = R_ii^-1 on the diagonal and -X_ii (R_i,>i X_>i) right of it. It
    needs row block i of R, and the rows of X below, which are computed already.
    """
    for block in reversed(bounds):
        unit = torch.eye(block.stop - block.start, dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(matrix[block, block], unit, upper=True)
        right = matrix[block, block.stop :] @ matrix[block.stop :, block.stop :]
        matrix[block, block.stop :] = inverse.neg() @ right
        matrix[block, block] = inverse


def narrow_(matrix: Tensor) -> Tensor:
    """Round a float64 (C, C) to fp32 in the same memory, from the first row on.

    Returns the fp32 matrix; the contents of the argument are destroyed.
    """
    rows = matrix.shape[0]
    narrow = matrix.view(-1).view(torch.float32)[: matrix.numel()].view(matrix.shape)
    for top in range(0, rows, _BLOCK):
        # Row i of the result ends at or before the address where row i of the source begins.
        narrow[top : top + _BLOCK] = matrix[top : top + _BLOCK].float()
    return narrow
