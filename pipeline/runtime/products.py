"""Matrix products and attention of forwards in pieces, on several threads of a CPU.

They are cut by their shape alone, and on one thread too, so the bytes do not depend on the threads
(`pipeline.runtime.threads`). All other operators of a forward run on one thread. On other devices
nothing is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pipeline.runtime.threads import LEAST_ROWS, MOST_PIECES, in_pieces, row_pieces

# Of a piece: below this, handing it to a thread takes a large part of its time.
_LEAST_OPERATIONS = 1 << 24
# Of a piece of a product with few rows, which is cut by columns.
_LEAST_COLUMNS = 512


class InPieces(TorchFunctionMode):
    """While this is active, torch's functions for products and attention compute in pieces."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        cut = _CUT.get(func)
        if cut is not None and "out" not in kwargs and not torch.is_grad_enabled():
            result = cut(*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


def product(left: Tensor, right: Tensor) -> Tensor:
    """(M, K) @ (K, N), in pieces on a CPU. The result has no gradient."""
    result = _rows_product(left, right)
    return left @ right if result is None else result


# The functions below have the arguments of torch's own. They return None for what is not cut.


def _rows_product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """(M, K) @ (K, N) + (N,), cut by rows, or by columns where there are few rows."""
    if not _on_cpu(left, right, bias):
        return None
    (rows, inner), columns = left.shape, right.shape[1]
    # Few rows are cut into two pieces at least: half as many are still worth a thread.
    least = LEAST_ROWS if rows >= 2 * LEAST_ROWS else LEAST_ROWS // 2
    pieces = row_pieces(left, max(least, _LEAST_OPERATIONS // max(2 * inner * columns, 1)))
    by_columns = len(pieces) == 1
    if by_columns:
        least = max(_LEAST_COLUMNS, _LEAST_OPERATIONS // max(2 * inner * rows, 1))
        pieces = row_pieces(right.T, least)
    if len(pieces) == 1:
        return None
    out = left.new_empty(rows, columns)

    def work(piece: slice) -> None:
        here, there, target, added = left, right, out, bias
        if by_columns:
            there, target = right[:, piece], out[:, piece]
            added = None if bias is None else bias[piece]
        else:
            here, target = left[piece], out[piece]
        if added is None:
            torch.mm(here, there, out=target)
        else:
            torch.addmm(added, here, there, out=target)

    in_pieces(work, pieces)
    return out


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if weight.dim() != 2 or not _on_cpu(input, weight, bias):
        return None
    out = _rows_product(input.reshape(-1, input.shape[-1]), weight.T, bias)
    return None if out is None else out.view(*input.shape[:-1], weight.shape[0])


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor | None:
    plain = beta == alpha == 1 and input.dim() == 1 and len(input) == mat2.shape[1]
    return _rows_product(mat1, mat2, input) if plain else None


def _matmul(input: Tensor, other: Tensor) -> Tensor | None:
    if input.dim() < 2 or other.dim() < 2:
        return None
    if other.dim() == 2:
        return _linear(input, other.T)
    if input.shape[:-2] != other.shape[:-2]:
        return None
    out = _bmm(input.reshape(-1, *input.shape[-2:]), other.reshape(-1, *other.shape[-2:]))
    return None if out is None else out.view(*input.shape[:-1], other.shape[-1])


def _bmm(input: Tensor, mat2: Tensor) -> Tensor | None:
    return _batches(torch.bmm, input, mat2)


def _baddbmm(
    input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor | None:
    shape = (batch1.shape[0], batch1.shape[1], batch2.shape[2])
    added = input.expand(shape)

    def some(first: Tensor, second: Tensor, addend: Tensor, out: Tensor) -> Tensor:
        return torch.baddbmm(addend, first, second, beta=beta, alpha=alpha, out=out)

    return _batches(some, batch1, batch2, added)


def _batches(
    some: Callable[..., Tensor], left: Tensor, right: Tensor, *more: Tensor
) -> Tensor | None:
    """(B, M, K) @ (B, K, N), cut by batches; `some` computes a piece of them into `out`."""
    if not _on_cpu(left, right, *more):
        return None
    (count, rows, inner), columns = left.shape, right.shape[2]
    number = _most_pieces(count, 2 * count * rows * inner * columns)
    if number == 1:
        return None
    out = left.new_empty(count, rows, columns)
    tensors = (left, right, *more)
    in_pieces(
        lambda piece: some(*(tensor[piece] for tensor in tensors), out=out[piece]),
        _even(count, number),
    )
    return out


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """(B, H, S, D), with keys and values (B, H', S', D), cut by batches and heads."""
    if query.dim() != 4 or dropout_p or not _on_cpu(query, key, value):
        return None
    batches, heads, length, width = query.shape
    kept = key.shape[1]  # heads of keys, of which each serves as many of the queries
    if key.shape[0] != batches or value.shape[:2] != key.shape[:2] or heads % max(kept, 1):
        return None
    operations = 4 * batches * heads * length * key.shape[2] * width
    pieces = [
        (batch, group)
        for batch in range(batches)
        for group in _even(kept, _most_pieces(kept, operations, batches))
    ]
    if len(pieces) == 1:
        return None
    # In memory the heads of a token follow each other, as in the output of torch's kernel.
    out = query.new_empty(batches, length, heads, value.shape[3]).transpose(1, 2)
    each = heads // kept

    def work(piece: tuple[int, slice]) -> None:
        batch, group = piece
        one, queries = slice(batch, batch + 1), slice(group.start * each, group.stop * each)
        out[one, queries] = functional.scaled_dot_product_attention(
            query[one, queries],
            key[one, group],
            value[one, group],
            attn_mask=_part(attn_mask, one, queries),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    in_pieces(work, pieces)
    return out


def _part(mask: Tensor | None, batches: slice, heads: slice) -> Tensor | None:
    """The mask of some batches and heads, from one that is broadcast to (B, H, S, S')."""
    if mask is None or mask.dim() < 3:
        return mask
    if mask.shape[-3] > 1:
        mask = mask[..., heads, :, :]
    return mask[batches] if mask.dim() == 4 and mask.shape[0] > 1 else mask


def _on_cpu(*tensors: Tensor | None) -> bool:
    """Whether all are plain tensors on a CPU, of one floating-point dtype."""
    given = [tensor for tensor in tensors if tensor is not None]
    return given[0].is_floating_point() and all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == given[0].dtype
        and tensor.layout == torch.strided
        for tensor in given
    )


def _most_pieces(count: int, operations: int, others: int = 1) -> int:
    """In how many pieces to cut `count` items, if what they are of is cut `others` times."""
    number = 1
    while (
        number * others < MOST_PIECES
        and count >= 2 * number
        and operations >= 2 * number * others * _LEAST_OPERATIONS
    ):
        number *= 2
    return number


def _even(count: int, number: int) -> list[slice]:
    step = -(-count // number)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


_CUT: dict[Any, Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    functional.scaled_dot_product_attention: _attention,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
}
