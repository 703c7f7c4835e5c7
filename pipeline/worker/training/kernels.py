"""Kernels of a backward whose result is the same in every run, and what has none."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# torch warns so where `use_deterministic_algorithms` cannot be followed.
_WARNING = re.compile(r"(\S+) does not have a deterministic implementation")


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[set[str]]:
    """While this is active, attention on a GPU has a backward that is the same in every run.

    Yields a set, to which the names of operators are added, at the end, that have none. On a CPU
    all have: each sequence is computed by one thread.
    """
    varying: set[str] = set()
    if device.type == "cpu":
        yield varying
        return
    # The backward of the memory-efficient kernel adds in no fixed order.
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with warnings.catch_warnings(record=True) as seen, sdpa_kernel(kernels):
        warnings.simplefilter("always")
        yield varying
    for warning in seen:
        if (found := _WARNING.search(str(warning.message))) is not None:
            varying.add(found[1])
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
