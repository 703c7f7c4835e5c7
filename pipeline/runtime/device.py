"""The device that a worker computes on, its free memory, and settings for repeatable results."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from pipeline.runtime.free_memory import available_memory
from pipeline.runtime.threads import set_threads
from storage.errors import ConfigError, first_line


def choose_device(name: str | None) -> torch.device:
    """The device of `--device`; None: a GPU if there is one, else the CPU.

    Raises `ConfigError` for a device that this machine does not have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name} cannot be used here: {first_line(error)}") from error


@dataclass(frozen=True)
class FreeMemory:
    """The free memory of a worker.

    node: its name. host: free bytes of the node. gpu: UUID of the GPU, which several workers may
    share; None on a CPU. free, total: free and total bytes of the GPU; 0 on a CPU.
    """

    node: str
    host: float
    gpu: str | None = None
    free: float = 0.0
    total: float = 0.0


def free_memory_on(device: torch.device) -> FreeMemory:
    """The memory that a worker on `device` has free now."""
    node, host = platform.node(), available_memory()
    if device.type != "cuda":
        return FreeMemory(node, host)
    free, total = torch.cuda.mem_get_info(device)
    name = str(torch.cuda.get_device_properties(device).uuid)
    return FreeMemory(node, host, name, float(free), float(total))


def statistics_room(device: torch.device) -> float | None:
    """The most bytes of statistics that a device should hold at once; None for no limit.

    On a GPU it is half of its memory: solves need two more matrices, of one group at a time.
    """
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory / 2


def make_deterministic(threads: int) -> None:
    """Fixes the choice of kernels: equal inputs then give equal bytes, on any number of threads.

    threads: how many pieces of work are computed at a time (see `pipeline.runtime.threads`).
    """
    # cuBLAS reads it when its first handle is created.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    set_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
