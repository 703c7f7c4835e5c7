"""What an error of a device or of a collective means: memory, the device, the network, the set-up.

torch has few classes for them: most are RuntimeErrors, told apart by the words of CUDA, cuBLAS,
cuSOLVER, Triton and NCCL. So the rules are here, in one place, and pure.
"""

from __future__ import annotations

from typing import Literal

import torch

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
