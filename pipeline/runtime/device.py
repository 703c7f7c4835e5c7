"""The device that a rank computes on, and what makes its results repeatable."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from pipeline.runtime.free_memory import available_memory
from storage.errors import ConfigError, first_line


def choose_device(name: str | None) -> torch.device:
    """The device that `--device` names; by default the GPU where there is one.

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
    """What a rank finds free: on its node, in bytes of memory, and on its GPU, if it has one.

    gpu names the GPU, which several ranks may share; total is its memory in bytes.
    """

    node: str
    host: float
    gpu: str | None = None
    free: float = 0.0
    total: float = 0.0


def free_memory_on(device: torch.device) -> FreeMemory:
    """The room that a rank on `device` has now."""
    node, host = platform.node(), available_memory()
    if device.type != "cuda":
        return FreeMemory(node, host)
    free, total = torch.cuda.mem_get_info(device)
    name = str(torch.cuda.get_device_properties(device).uuid)
    return FreeMemory(node, host, name, float(free), float(total))


def statistics_room(device: torch.device) -> float | None:
    """Bytes of statistics that a device should hold at once; None for any number.

    Half of a GPU: a solve takes two matrices more, of one group at a time.
    """
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory / 2


def make_deterministic(threads: int) -> None:
    """Fixes what lets equal inputs give unequal bytes: thread count and kernel choice."""
    # Read by cuBLAS when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
