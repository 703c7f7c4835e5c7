"""The smallest Triton kernel, for `trial_launch`. Imported only where Triton is installed."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

_ENTRIES = 64


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _double(source, target, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: twice each of BLOCK entries."""
    places = tl.arange(0, BLOCK)
    tl.store(target + places, 2 * tl.load(source + places))


def doubles(device: torch.device) -> bool:
    """Whether the kernel, run on `device`, doubles numbers. Waits for it."""
    source = torch.arange(_ENTRIES, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    with torch.cuda.device(source.device):
        _double[(1,)](source, target, BLOCK=_ENTRIES)
    return bool(torch.equal(target.cpu(), 2 * source.cpu()))
