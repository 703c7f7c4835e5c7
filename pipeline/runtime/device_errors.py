"""What an error of a device or of a collective means, how it is explained, and what can be lowered.

torch has few classes for them: most are RuntimeErrors, told apart by the words of CUDA, cuBLAS,
cuSOLVER, Triton and NCCL. So the rules are here, in one place, and pure.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from storage.errors import DeviceFaultError, ResourceError

Fault = Literal["memory", "device", "collective", "peer"]
"""memory: an allocation failed. device: the GPU's context is of no more use (ECC, a failed launch,
an illegal address). collective: NCCL itself cannot work here. peer: another worker is gone."""

# Words of an allocation that failed, beside torch's classes. cuSOLVER and cuBLAS allocate their
# own workspaces; Triton reports CUDA's words under a name of its own.
_MEMORY = (
    "DefaultCPUAllocator",
    "out of memory",
    "ALLOC_FAILED",
    "cudaErrorMemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "Cannot allocate memory",
)
# After these a process cannot use its GPU any more.
_DEVICE = (
    "uncorrectable ECC error",
    "unspecified launch failure",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "launch timed out",
    "device-side assert",
    "invalid program counter",
    "Invalid access of peer GPU memory",
    "hardware stack error",
    "EXECUTION_FAILED",
    "CUDA error",
    "Triton Error [CUDA]",
    "GPU is lost",
)
# NCCL's own troubles, which come again with every attempt.
_COLLECTIVE = (
    "ncclInvalidUsage",
    "ncclInvalidArgument",
    "ncclInternalError",
    "ncclUnhandledCudaError",
    "unhandled cuda error",
    "invalid usage",
    "Duplicate GPU detected",
    "shared memory segment",
    "NCCL library not found",
    "without NCCL",
    "doesn't have NCCL built in",
)
_SHOWN = 300  # characters of a library's message
_ADVICE = re.compile(r"\s(?:If reserved but|See documentation|Compile with|For debugging)")


def fault_of(error: BaseException) -> Fault | None:
    """What `error` means; None for an error of another kind, such as a bug.

    The words decide before the class: torch raises `AcceleratorError` for a failed allocation too.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "memory"
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if any(words in text for words in _MEMORY):
        return "memory"
    of_group = isinstance(error, torch.distributed.DistError) or "NCCL" in text or "gloo" in text
    if of_group:
        return "collective" if any(words in text for words in _COLLECTIVE) else "peer"
    if isinstance(error, torch.AcceleratorError) or any(words in text for words in _DEVICE):
        return "device"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, on a GPU or in host memory."""
    return fault_of(error) == "memory"


@contextmanager
def explaining(phase: str, block: int | None, device: torch.device) -> Iterator[None]:
    """Raises prox24's own error for a failed allocation or a failed GPU; others pass unchanged.

    Raises `ResourceError` for memory, and `DeviceFaultError` for a GPU that this process cannot use
    any more.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        fault = fault_of(error)
        if fault == "memory":
            raise explained(error, phase, block, device.type) from error
        if fault == "device":
            raise DeviceFaultError(
                f"{_of(block)}phase {phase}: the GPU of node {platform.node()} failed "
                f"({in_short(error)}); if it comes again, look at `nvidia-smi -q -d ECC` and dmesg"
            ) from error
        raise


def explained(
    error: BaseException, phase: str, block: int | None, device: str = "cpu"
) -> ResourceError:
    """The error for users, with block, phase, sizes, and what to lower. device: its type."""
    return ResourceError(
        f"{_of(block)}phase {phase}: out of memory ({in_short(error)}); {remedy(phase, device)}"
    )


def in_short(error: BaseException) -> str:
    """The first sentences of a library's message, on one line: with its sizes, without its advice.

    The point of a number (`20.00 GiB`) ends no sentence.
    """
    text = " ".join(str(error).split())
    text = _ADVICE.split(text)[0]
    return text[:_SHOWN].rstrip(". ") or type(error).__name__


def _of(block: int | None) -> str:
    return "" if block is None else f"block {block}, "


def remedy(phase: str, device: str = "cpu") -> str:
    """What the user can lower or add, depending on the phase and the type of device."""
    if device == "cuda":
        return _of_gpu(phase)
    nodes = "fewer workers on a node (--workers), or nodes with more memory"
    if phase in ("embed", "calibrate", "advance", "propagate"):
        return f"lower --batch-size (of a new job), or use {nodes}"
    if phase in ("solve", "choose", "reduce"):
        return f"use {nodes}: a solve holds some matrices as large as a layer's Hessian"
    return f"use {nodes}"


def _of_gpu(phase: str) -> str:
    """The same for a GPU, which has one worker: fewer workers would leave each more to hold."""
    others = "see with nvidia-smi that no other program is on the GPU, or use GPUs with more memory"
    if phase in ("embed", "calibrate", "advance", "propagate"):
        return f"lower --batch-size (of a new job) or --hessian-memory; {others}"
    if phase in ("solve", "choose", "reduce"):
        return f"lower --hessian-memory, or use more workers, each with fewer rows; {others}"
    return others
