"""Inverse and inverse factor of a matrix in place, from matrix products and small Cholesky factors.

Why not the library functions: LAPACK's bytes depend on the number of threads. cuSOLVER copies the
matrix and allocates workspace (`cholesky_inverse` on CUDA holds three C x C buffers), and at
C = 28,672 each buffer is 3.3 GB. These functions use the given buffer and O(C * block) more, and
run at the speed of matrix products, on CPU and CUDA, on all threads.

`invert_` and `upper_factor_` return a 0-d bool tensor on the device of the matrix: True where it
was positive definite to working precision. The caller decides when to wait for it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pipeline.runtime.split import deal
from pipeline.runtime.threads import in_pieces, pieces_of
from pipeline.solvers.types import Team

# Columns of a block: on a CPU few, so that little is left to the small factors, which one thread
# computes; elsewhere many, so that few operators are started.
_BLOCK_CPU = 128
_BLOCK = 512
# Rows of a stripe of the lower triangle: narrow ones leave fewer entries above the diagonal that
# are computed for nothing, wide ones are larger products.
_STRIPE = 1024
_BLOCK_FLOAT64 = 256
_LEAST_ROWS = 128  # of a piece


def _bounds(columns: int, width: int) -> list[slice]:
    return [slice(at, min(at + width, columns)) for at in range(0, columns, width)]


def _at_a_time(matrix: Tensor, blocks: list[slice]) -> list[slice]:
    """The blocks, as pieces for threads; one piece on a device that divides its work itself."""
    if matrix.device.type == "cpu" or not blocks:
        return blocks
    return [slice(blocks[0].start, blocks[-1].stop)]


def invert_(matrix: Tensor, team: Team | None = None) -> Tensor:
    """Replace a symmetric positive definite (C, C) by its inverse; returns whether it was definite.

    The block sweep of `invert_blocks_`, on a CPU with narrow blocks and in pieces for threads. C^3
    operations, on a CPU about the time of LAPACK on one thread. team: who has the same matrix and
    calls this too; each member sweeps some of the pieces, and all get the same bytes as without.
    """
    return _sweep_blocks(matrix, *_division(matrix.shape[0], matrix.device.type), team)


def invert_blocks_(matrix: Tensor, team: Team | None = None) -> Tensor:
    """`invert_` as devices other than a CPU compute it: in wide blocks and stripes.

    The block sweep (Gauss-Jordan) of a symmetric matrix. Sweeping block k, with P the inverse of
    its pivot block, replaces the pivot by -P, multiplies its row and column by P, and subtracts
    A_rk P A_kr from the rest. After all blocks the matrix is minus the inverse. Each pivot is a
    Schur complement of a positive definite matrix, so no rows have to be exchanged.
    Only the lower triangle is read and swept, in stripes of rows; the upper one is copied from it
    at the end. About C^3 operations (`sweep_operations`). Extra memory: two C x block panels.
    """
    return _sweep_blocks(matrix, *_division(matrix.shape[0], "cuda"), team)


def sweep_operations(columns: int, device: str) -> float:
    """Operations of the products of `invert_` for C columns: C^3 and what is wasted.

    device: a torch device type.
    """
    width, pieces = _division(columns, device)
    area = sum(2.0 * (each.stop - each.start) * each.stop for each in pieces)
    widths = [each.stop - each.start for each in _bounds(columns, width)]
    return float(sum(area * width + 2.0 * columns * width * width for width in widths))


def sweep_launches(columns: int) -> int:
    """Kernels that `invert_blocks_` starts on a GPU for C columns, by counting."""
    blocks, stripes = -(-columns // _BLOCK), -(-columns // _STRIPE)
    return blocks * (stripes + 11) + 6 * stripes + 7


def _division(columns: int, device: str) -> tuple[int, list[slice]]:
    """The width of a block of the sweep, and the pieces of rows that a block is applied to."""
    if device == "cpu":
        return _BLOCK_CPU, pieces_of(columns, _LEAST_ROWS)
    return _BLOCK, _bounds(columns, _STRIPE)


def _sweep_blocks(
    matrix: Tensor, width: int, pieces: list[slice], team: Team | None = None
) -> Tensor:
    """The sweep in blocks of `width` columns; the rest of the matrix in these pieces of rows.

    Of a team each member keeps its own pieces up to date, and has the others' where it reads them.
    """
    owners = _owners(pieces, team)
    own = [piece for piece, owner in zip(pieces, owners, strict=True) if _is_mine(team, owner)]
    sound = torch.ones((), dtype=torch.bool, device=matrix.device)
    for block in _bounds(matrix.shape[0], width):
        if team is not None:
            _send_block(matrix, block, pieces, owners, team)
        factor, info = torch.linalg.cholesky_ex(matrix[block, block])
        sound &= info == 0
        pivot = torch.cholesky_inverse(factor)
        # The column of the block, its rows above the pivot by symmetry. The rows of the pivot are
        # 0: they are overwritten below.
        left, below = matrix[block, : block.start], matrix[block.stop :, block]
        column = torch.cat([left.T, torch.zeros_like(pivot), below])
        scaled = torch.empty_like(column)
        in_pieces(partial(_scale, column, pivot, scaled), _at_a_time(matrix, pieces))
        in_pieces(partial(_sweep, matrix, column, scaled), own)
        below.copy_(scaled[block.stop :])
        left.copy_(scaled[: block.start].T)
        matrix[block, block] = -pivot
    if team is not None:
        for piece, owner in zip(pieces, owners, strict=True):
            _send(matrix[piece, : piece.stop], owner, team)
    in_pieces(partial(_finish, matrix), pieces)
    return sound & torch.isfinite(matrix.diagonal()).all()


def _owners(pieces: list[slice], team: Team | None) -> list[int]:
    """The member of the team that sweeps each piece: equal shares of the lower triangle."""
    if team is None:
        return [0] * len(pieces)
    areas = {at: float(each.stop - each.start) * each.stop for at, each in enumerate(pieces)}
    dealt = deal(list(areas), areas, team.size)
    return [dealt[at] for at in areas]


def _is_mine(team: Team | None, owner: int) -> bool:
    return team is None or team.index == owner


def _send_block(
    matrix: Tensor, block: slice, pieces: list[slice], owners: list[int], team: Team
) -> None:
    """Gives all members the block's rows and columns of the lower triangle."""
    for piece, owner in zip(pieces, owners, strict=True):
        stop = min(piece.stop, block.stop)
        rows = slice(min(max(piece.start, block.start), stop), stop)
        below = slice(min(max(piece.start, block.stop), piece.stop), piece.stop)
        for part in (matrix[rows, : block.stop], matrix[below, block]):
            if len(part):
                _send(part, owner, team)


def _send(part: Tensor, owner: int, team: Team) -> None:
    """Gives all members of the team the owner's entries of a part of the matrix."""
    mine = _is_mine(team, owner)
    packed = part.contiguous() if mine else part.new_empty(part.shape)
    team.send(packed, owner)
    if not mine:
        part.copy_(packed)


def _scale(column: Tensor, pivot: Tensor, scaled: Tensor, rows: slice) -> None:
    """Some rows of the block's column times the inverse of its pivot, into `scaled`."""
    torch.mm(column[rows], pivot, out=scaled[rows])


def _sweep(matrix: Tensor, column: Tensor, scaled: Tensor, rows: slice) -> None:
    """One block of the sweep for some rows of the lower triangle."""
    matrix[rows, : rows.stop].addmm_(scaled[rows], column[: rows.stop].T, alpha=-1)


def _finish(matrix: Tensor, rows: slice) -> None:
    """Some rows of the lower triangle with the other sign, and the columns that mirror them."""
    matrix[rows, : rows.stop].neg_()
    matrix[: rows.start, rows] = matrix[rows, : rows.start].T
    tile = matrix[rows, rows]
    tile.copy_(tile.tril() + tile.tril(-1).T)


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
        panel = torch.empty_like(above, memory_format=torch.contiguous_format)
        in_pieces(partial(_solve_panel, factor, above, panel), _at_a_time(matrix, bounds[:index]))
        above.copy_(panel)
        in_pieces(partial(_update, matrix, panel), bounds[:index])
    _invert_upper_(matrix, bounds)
    return sound & torch.isfinite(matrix.diagonal()).all()


def factor_launches(columns: int) -> int:
    """Kernels that `upper_factor_` and `narrow_` start on a GPU for C columns, by counting."""
    blocks = -(-columns // _BLOCK_FLOAT64)
    return blocks * (blocks - 1) // 2 + 17 * blocks + 8


def _solve_panel(factor: Tensor, above: Tensor, panel: Tensor, rows: slice) -> None:
    """Some rows of the panel X with X R_kk^T = A_above, which is R_kk X^T = A_above^T."""
    panel[rows] = torch.linalg.solve_triangular(factor, above[rows].T, upper=True).T


def _update(matrix: Tensor, panel: Tensor, left: slice) -> None:
    """Subtracts X X^T in some columns, of the upper triangle only."""
    matrix[: left.stop, left].addmm_(panel[: left.stop], panel[left].T, alpha=-1)


def _invert_upper_(matrix: Tensor, bounds: list[slice]) -> None:
    """Replace upper triangular R by its inverse X, from the last row block to the first.

    Row block i of X is X_ii = R_ii^-1 on the diagonal and -X_ii (R_i,>i X_>i) right of it. It
    needs row block i of R, and the rows of X below, which are computed already.
    """
    for index, block in reversed(list(enumerate(bounds))):
        unit = torch.eye(block.stop - block.start, dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(matrix[block, block], unit, upper=True)
        row, below = matrix[block, block.stop :].clone(), matrix[block.stop :]
        target = matrix[block]
        right = partial(_right, target, row, below, inverse.neg())
        in_pieces(right, _at_a_time(matrix, bounds[index + 1 :]))
        matrix[block, block] = inverse


def _right(target: Tensor, row: Tensor, below: Tensor, negative: Tensor, columns: slice) -> None:
    """Some columns of a row block of X: -X_ii (R_i,>i X_>i), of which X_>i is 0 below them."""
    first = target.shape[1] - row.shape[1]
    known = columns.stop - first
    target[:, columns] = negative @ (row[:, :known] @ below[:known, columns])


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
