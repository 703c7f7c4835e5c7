"""A solved weight in the dtype in which the model is stored: what does not fit is an error."""

from __future__ import annotations

import torch
from torch import Tensor

from storage.errors import NumericalError


def as_stored(weight: Tensor, dtype: torch.dtype, remedy: str) -> tuple[Tensor, tuple[str, ...]]:
    """A solved weight (R, C) fp32 in `dtype`, and notes for the report.

    A kept weight that becomes 0, because it is too small for `dtype`, is noted.
    Raises NumericalError, with `remedy`, for a weight that is beyond `dtype` (none is clamped), and
    for NaN or Inf in `weight`.
    """
    stored = weight.to(dtype)
    if weight.numel() and not bool(torch.isfinite(torch.stack(stored.aminmax())).all()):
        raise NumericalError(f"{_beyond(weight, stored)}; {remedy}")
    if dtype == weight.dtype or torch.count_nonzero(stored) == torch.count_nonzero(weight):
        return stored, ()
    return stored, (f"kept weights that are too small for {_name(dtype)} are stored as 0",)


def _beyond(weight: Tensor, stored: Tensor) -> str:
    bad = int((~torch.isfinite(weight)).sum())
    total = f"{weight.numel():,} solved weights"
    if bad:
        return f"{bad:,} of {total} are NaN or Inf"
    count, largest = int((~torch.isfinite(stored)).sum()), float(weight.abs().max())
    dtype = stored.dtype
    return (
        f"{count:,} of {total} are beyond {_name(dtype)}, in which the layer is stored: the "
        f"largest is {largest:.3g}, and {_name(dtype)} ends at {torch.finfo(dtype).max:g}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
