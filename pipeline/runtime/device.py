"""The device that a worker computes on, its free memory, and settings for repeatable results."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pipeline.runtime.free_memory import available_memory
from pipeline.runtime.nvidia import driver_version
from pipeline.runtime.threads import set_threads
from storage.errors import ConfigError, ResourceError, first_line


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


def check_given_gpus(gpus: Sequence[str], device: str | None, node: str) -> None:
    """Raises `ResourceError` where a worker was given GPUs that torch cannot use.

    gpus: ids of those that Ray gave to the worker. device: `--device`; `cpu` wants none. node: for
    the message. Without the error the job would run on one CPU thread of such a node.
    """
    if not gpus or device is not None or torch.cuda.is_available():
        return
    build, driver = torch.version.cuda, driver_version()
    built = f"a build for CUDA {build}" if build else "a build without CUDA"
    with_driver = f"NVIDIA driver {driver}" if driver else "no NVIDIA driver"
    raise ResourceError(
        f"node {node}: Ray gave this worker GPU {', '.join(gpus)}, but torch {torch.__version__} "
        f"({built}) finds none with {with_driver}: install a driver for that CUDA, or the build of "
        "torch for CUDA that the driver runs (`prox24 doctor` shows each node); --device cpu "
        "computes on the CPUs"
    )


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
    # Blocks of a model differ in size: segments that can grow are not left in pieces. Read when the
    # first tensor is made on a GPU; every tested torch knows this name, and takes it first.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    set_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Allows or forbids TF32 for the fp32 products inside on a CUDA device; then all is as before.

    TF32 rounds the operands to a mantissa of 10 bits; their products are exact and summed in fp32.
    The rule of a worker is not to round, and the switch belongs to the process: it is turned on
    here alone, around the products that are meant. It changes nothing on a CPU.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
