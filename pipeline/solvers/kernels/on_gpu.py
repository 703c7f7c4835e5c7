"""The Triton kernels, imported only where a solve on a CUDA device asks for them."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from storage.errors import ResourceError


@cache
def triton_module(name: str) -> Any:
    """The module `name` of this package, which imports Triton.

    Raises `ResourceError` where Triton is not installed: a solve never goes over to plain torch
    operations by itself, because it would take many times as long and give other bytes.
    """
    if find_spec("triton") is None:
        raise ResourceError(
            "Triton is not installed, and a solve on a CUDA device needs it: install the build of "
            "torch for CUDA, which brings it, or `pip install triton`; or choose kernels `torch`, "
            "plain torch operations, which are slower"
        )
    return import_module(f"pipeline.solvers.kernels.{name}")
