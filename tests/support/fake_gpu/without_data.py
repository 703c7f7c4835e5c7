"""Tensors without data: the fake GPU at sizes that no machine could hold, for counting alone.

With `fake_gpu(data=False)` a tensor on the GPU wraps one on the meta device, and a tensor on the
meta device that is not wrapped stands for one in host memory. What is small is real in host memory.
Code then takes the path that it takes for ordinary numbers, by these rules for what the host reads:

* a bool is True, but False where `any` made it: sums are finite, matrices positive definite;
* a float is 1, an integer 0 (no dead input, no error code, no row that was not refined), except in
  the functions of `READ`;
* indexing with a mask takes all entries.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")
# Function -> the integer that it reads: `estimate` returns early without live columns.
READ = {"estimate": 1}
# What is copied from the GPU has real values up to this size.
_SMALL_BYTES = 1 << 20


def without(value: Any) -> Any:
    """The tensors of a call on the meta device; anything else as it is."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(META), value)


def on_host(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operator in host memory: without data where an argument is."""
    if not any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
        return func(*args, **kwargs)
    options = dict(kwargs)
    if options.get("device") is not None:
        options["device"] = META
    if func is torch.ops.aten.copy_.default and not args[0].is_meta:
        return args[0]  # real memory: it keeps its values
    return func(*without(tuple(args)), **options)


def to_host(result: Tensor, made_by: str, stated: Tensor | None) -> Tensor:
    """A copy from the GPU: with values where it is small or they are stated."""
    if stated is not None:
        return stated.clone()
    if result.nbytes > _SMALL_BYTES:
        return result
    return torch.full(result.shape, _value(result.dtype, made_by), dtype=result.dtype)


def result_of(
    func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], made_by: str
) -> Any:
    """What an operator on the GPU gives, from arguments on the meta device.

    made_by: the operator that made the first argument.
    """
    first = args[0] if args else None
    if name == "equal":
        return True
    if name in ("_local_scalar_dense", "is_nonzero"):
        return _value(first.dtype, made_by)
    if name == "index" and args[1] and args[1][0] is not None and args[1][0].dtype == torch.bool:
        mask = args[1][0]
        return first.new_empty((mask.numel(), *first.shape[mask.dim() :]))
    if name == "nonzero":
        return first.new_empty((first.numel(), first.dim()), dtype=torch.int64)
    if name == "masked_select":
        return first.new_empty(first.numel())
    if name == "bincount":
        return first.new_empty(kwargs.get("minlength") or args[2], dtype=torch.int64)
    return func(*args, **kwargs)


def _value(dtype: torch.dtype, made_by: str) -> Any:
    if dtype == torch.bool:
        return made_by != "any"
    if dtype.is_floating_point:
        return 1.0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if "/pipeline/" in frame.f_code.co_filename:
            return READ.get(frame.f_code.co_name, 0)
        frame = frame.f_back
    return 0


def factor_operations(name: str, args: Sequence[Any]) -> int:
    """Operations of a factorization, of the inverse from a factor, or of a triangular solve."""
    if name == "linalg_cholesky_ex":
        return int(args[0].shape[-1] ** 3 / 3)
    if name == "cholesky_inverse":
        return int(2 * args[0].shape[-1] ** 3 / 3)
    if name == "linalg_solve_triangular":
        return int(args[0].shape[-1] * args[1].numel())
    return 0


def moved_bytes(name: str, args: Any, kwargs: Mapping[str, Any], result: Any) -> int:
    """Bytes that a kernel reads and writes, an expanded dimension once; 0 for an allocation."""
    if "empty" in name or name == "_unsafe_view":
        return 0
    if name == "embedding":  # reads rows of the table
        return 2 * int(result.nbytes)
    inputs = {key: value for key, value in kwargs.items() if key != "out"}
    leaves = tree_leaves((args, inputs, result))
    return sum(_bytes(leaf) for leaf in leaves if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()
