"""Out-of-memory errors: how they are recognised, and what the user can lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from storage.errors import ResourceError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, on a GPU or in host memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch has no error class for a failed allocation on the host.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextmanager
def explaining(phase: str, block: int | None) -> Iterator[None]:
    """Raises `ResourceError` for an out-of-memory error inside; other errors pass unchanged."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise explained(error, phase, block) from error
        raise


def explained(error: Exception, phase: str, block: int | None) -> ResourceError:
    """The error for users, with block, phase and what to lower."""
    of_block = "" if block is None else f"block {block}, "
    first = " ".join(str(error).split(".")[0].split()) or type(error).__name__
    return ResourceError(f"{of_block}phase {phase}: out of memory ({first}); {remedy(phase)}")


def remedy(phase: str) -> str:
    """What the user can lower or add, depending on the phase."""
    nodes = "fewer workers on a node (--workers), or nodes with more memory"
    if phase in ("embed", "calibrate", "advance", "propagate"):
        return f"lower --batch-size (of a new job), or use {nodes}"
    if phase in ("solve", "choose", "reduce"):
        return f"use {nodes}: a solve holds some matrices as large as a layer's Hessian"
    return f"use {nodes}"
