"""The GPU on which products are timed. All code that needs a GPU is in this file."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The first compute capability of NVIDIA's GPUs with 2:4 products in hardware.
_FIRST_CAPABILITY = (8, 0)
_WARM_UP_RUNS = 3


@dataclass(frozen=True)
class Machine:
    """Where products run.

    seconds: a function -> the median time of several runs. compress: a 2:4 weight (R, C) -> a
    tensor of the same shape whose products use the hardware; raises RuntimeError, ValueError or
    NotImplementedError for a shape or dtype that is not supported. free: returns the bytes of free
    memory.
    """

    name: str
    device: torch.device
    seconds: Callable[[Callable[[], object]], float]
    compress: Callable[[Tensor], Tensor]
    free: Callable[[], float]


def missing_gpu() -> str | None:
    """Why this machine has no GPU that can do 2:4 products; None if it has one."""
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible here"
    name = torch.cuda.get_device_name()
    if torch.version.cuda is None:
        return f"{name} is not an NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < _FIRST_CAPABILITY:
        return "{} has compute capability {}.{}; 2:4 products need {}.{} (Ampere) or newer".format(
            name, *capability, *_FIRST_CAPABILITY
        )
    return None


def this_gpu(repeats: int) -> Machine:
    """The current CUDA device, with the semi-structured sparse tensors of torch.

    repeats: number of runs that are timed.
    """

    def seconds(work: Callable[[], object]) -> float:
        for _ in range(_WARM_UP_RUNS):
            work()
        times = []
        for _ in range(repeats):
            begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return float(statistics.median(times))

    def compress(weight: Tensor) -> Tensor:
        compressed: Tensor = torch.sparse.to_sparse_semi_structured(weight)
        return compressed

    return Machine(
        torch.cuda.get_device_name(),
        torch.device("cuda"),
        seconds,
        compress,
        lambda: float(torch.cuda.mem_get_info()[0]),
    )
