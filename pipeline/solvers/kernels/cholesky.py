"""Factorizations in place, built of matrix products and small Cholesky factors.

Why not always the library's: cuSOLVER copies the matrix and takes workspace of its own
(``cholesky_inverse`` on CUDA holds three C x C buffers), and at C = 28,672 each is 3.3 GB. These
touch the given buffer and O(C * _BLOCK) more, run at the speed of products, and behave alike on
CPU and CUDA.

Every function returns a 0-d bool tensor on the matrix's device, True where the matrix was
positive definite to working precision, so that a caller decides when to wait for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 512
_BLOCK_FLOAT64 = 256
# LAPACK's 32-bit integers count the entries of a column block.
_LAPACK_LIMIT = 32_767


def _bounds(columns: int, width: int = _BLOCK) -> list[slice]:
    return [slice(at, min(at + width, columns)) for at in range(0, columns, width)]


def invert_(matrix: Tensor) -> Tensor:
    """Replace a symmetric positive definite (C, C) by its inverse; returns whether it was one.

    On a CPU by LAPACK, which works in the given memory if it is handed in column order and takes
    half to three quarters of the blocks' time; elsewhere by blocks. 2 C^3 operations.
    """
    on_cpu = matrix.device.type == "cpu" and matrix.is_contiguous()
    if not on_cpu or matrix.shape[0] > _LAPACK_LIMIT:
        return invert_blocks_(matrix)
    # The transpose of a symmetric matrix is itself, in column order.
    matrix, info = matrix.T, torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    if int(info):
        return info == 0
    torch.cholesky_inverse(matrix, out=matrix)
    return torch.isfinite(matrix.diagonal()).all()


def invert_blocks_(matrix: Tensor) -> Tensor:
    """`invert_` by products and small Cholesky factors, on any device.

    The block sweep (Gauss-Jordan) on a symmetric matrix: after block k is swept, with P the
    inverse of its pivot, the pivot is -P, its row and column are multiplied by P, and the rest
    has lost A_rk P A_kr; after all blocks the matrix is minus the inverse. Each pivot is a Schur
    complement of a positive definite matrix, so no exchange of rows is needed.
    2 C^3 operations. Extra memory: two C x 512 panels.
    """
    sound = torch.ones((), dtype=torch.bool, device=matrix.device)
    for block in _bounds(matrix.shape[0]):
        factor, info = torch.linalg.cholesky_ex(matrix[block, block])
        sound &= info == 0
        pivot = torch.cholesky_inverse(factor)
        column = matrix[:, block].clone()
        column[block] = 0  # the pivot's own rows are overwritten below
        scaled = column @ pivot
        matrix.addmm_(scaled, column.T, alpha=-1)
        matrix[:, block] = scaled
        matrix[block, :] = scaled.T
        matrix[block, block] = -pivot
    matrix.neg_()
    return sound & torch.isfinite(matrix.diagonal()).all()


def upper_factor_(matrix: Tensor) -> Tensor:
    """Replace a symmetric positive definite (C, C) by upper triangular U, U^T U = A^-1.

    A = R R^T with R upper triangular is Cholesky's recurrence from the last column to the first;
    then U = R^-1. Neither A^-1 nor a second C x C is formed. Only the upper triangle is read; the
    strict lower one is zeroed. Returns whether the matrix was positive definite.
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
        for left in bounds[:index]:  # the upper triangle only, a panel at a time
            matrix[: left.stop, left].addmm_(panel[: left.stop], panel[left].T, alpha=-1)
    _invert_upper_(matrix, bounds)
    return sound & torch.isfinite(matrix.diagonal()).all()


def _invert_upper_(matrix: Tensor, bounds: list[slice]) -> None:
    """Row block i of the inverse X of R is -X_ii (R_i,>i X_>i), with X_ii the inverse of R_ii:
    all it needs of X lies below it, all it needs of R in its own rows."""
    for block in reversed(bounds):
        unit = torch.eye(block.stop - block.start, dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(matrix[block, block], unit, upper=True)
        right = matrix[block, block.stop :] @ matrix[block.stop :, block.stop :]
        matrix[block, block.stop :] = inverse.neg() @ right
        matrix[block, block] = inverse


def narrow_(matrix: Tensor) -> Tensor:
    """Round a float64 (C, C) to fp32 in the same memory, row by row from the front; the argument
    is no longer of use."""
    rows = matrix.shape[0]
    narrow = matrix.view(-1).view(torch.float32)[: matrix.numel()].view(matrix.shape)
    for top in range(0, rows, _BLOCK):
        # Row i of the result ends at or before the place where row i of the source begins.
        narrow[top : top + _BLOCK] = matrix[top : top + _BLOCK].float()
    return narrow
