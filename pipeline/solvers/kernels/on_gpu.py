"""The Triton kernels, imported only where a solve on a CUDA device asks for them.

Triton compiles a kernel, and with a C compiler the code that launches it, when it is first used.
`trial_launch` does so with the smallest kernel, so that what is missing is found before compute.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from storage.errors import ResourceError

if TYPE_CHECKING:
    import torch

# Part of an error's message, in lower case -> what mends it. The first that is found counts.
_REMEDIES = (
    (
        "failed to find c compiler",
        "install gcc (apt-get install gcc libc6-dev), or name one in $CC",
    ),
    ("python.h", "install Python's headers (apt-get install python3-dev)"),
    ("libcuda.so", "install the GPU's driver there, or run `ldconfig`: its library is not found"),
    ("0 active drivers", "Triton finds no GPU: install its driver, and a build of torch for CUDA"),
    ("unsupported toolchain", "the driver is older than Triton's compiler: update the driver"),
    ("is not defined for option 'gpu-name'", "Triton does not know this GPU yet: update torch"),
    ("permission denied", "set TRITON_CACHE_DIR to a folder that the job may write to"),
    ("read-only file system", "set TRITON_CACHE_DIR to a folder that the job may write to"),
    ("failed to map segment", "set TRITON_CACHE_DIR to a folder that is not mounted noexec"),
    ("no space left", "make room, or set TRITON_CACHE_DIR to a folder on another disk"),
    (
        "non-zero exit status",
        "the C compiler failed: install gcc, libc6-dev and Python's headers (python3-dev)",
    ),
)
_OTHERWISE = "install the Triton that this torch asks for (`pip install --force-reinstall torch`)"


@cache
def triton_module(name: str) -> Any:
    """The module `name` of this package, which imports Triton.

    Raises `ResourceError` where Triton is not installed: a solve never goes over to plain torch
    operations by itself, because it would take many times as long and give other bytes.
    """
    if find_spec("triton") is None:
        raise ResourceError(
            "Triton is not installed, and a solve on a CUDA device needs it: install the build of "
            "torch for CUDA, which brings it, or `pip install triton`; or use --kernels torch, "
            "plain torch operations, which are slower"
        )
    return import_module(f"pipeline.solvers.kernels.{name}")


def trial_launch(device: torch.device) -> None:
    """Compiles the smallest kernel and runs it on a CUDA device: as a solve's kernels will be.

    Raises `ResourceError`, with the remedy, where Triton cannot, or where the result is wrong.
    """
    module = triton_module("trial_triton")
    try:
        right = module.doubles(device)
    except Exception as error:  # Triton raises whatever its compilers and loaders raise
        message = " ".join(str(error).split()) or type(error).__name__
        raise ResourceError(
            f"Triton cannot run a kernel on {device} ({message}); {launch_remedy(message)}; "
            "or use --kernels torch, plain torch operations, which are slower"
        ) from error
    if not right:
        raise ResourceError(
            f"Triton's kernel gave a wrong result on {device}: do not compute on this GPU; look "
            "at `nvidia-smi -q -d ECC` and replace it"
        )


def launch_remedy(message: str) -> str:
    """What mends a failed launch, by the message of its error."""
    text = message.lower()
    return next((remedy for part, remedy in _REMEDIES if part in text), _OTHERWISE)
