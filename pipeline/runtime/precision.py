"""Whether fp32 matrix products on a CUDA device may be TF32. The rule of a worker is: no.

TF32 rounds the operands to a mantissa of 10 bits; their products are exact and summed in fp32. The
switch belongs to the process (`make_deterministic` turns it off), so it is only ever turned on
inside `tf32_products`, around the products that are meant. It changes nothing on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Allows or forbids TF32 for the fp32 products inside; afterwards all is as before."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
