"""The device that a rank computes on, and what makes its results repeatable."""

from __future__ import annotations

import os

import torch

from pipeline.model import first_line
from storage.errors import ConfigError


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


def make_deterministic(threads: int) -> None:
    """Fixes what lets equal inputs give unequal bytes: thread count and kernel choice."""
    # Read by cuBLAS when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
