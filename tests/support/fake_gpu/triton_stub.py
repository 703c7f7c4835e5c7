"""Triton without Triton: kernels are "launched" on the fake GPU, and stand-ins compute for them.

Modules of the product that hold kernels are imported with this in Triton's place, so that all of
their code but the kernels' own is run. A launch is compared with what the hardware needs: a grid
that is not empty, and tensors on the GPU that are contiguous.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pipeline.config.pattern import Pattern
from pipeline.solvers import kernels
from pipeline.solvers.kernels import prox_operator
from pipeline.solvers.masks import keep_mask
from tests.support.fake_gpu.record import Record
from tests.support.fake_gpu.tensor import GpuTensor, WrongDevice

_LARGEST_GRID = 2**31 - 1


def _prox_operator(grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`prox_triton._operator`: by the CPU's kernel."""
    source, lambdas, target, groups, blocks = args
    assert grid[0] == len(lambdas) * blocks
    assert groups * len(lambdas) * 4 == source.numel()
    assert blocks * options["BLOCK"] >= groups > (blocks - 1) * options["BLOCK"]
    rows = source.reshape(len(lambdas), -1) if len(lambdas) > 1 else source
    result = prox_operator.prox_operator(rows, lambdas[0] if len(lambdas) == 1 else lambdas)
    target.copy_(result.reshape(target.shape))


@cache
def _compile_stand_ins() -> None:
    """Once a process, before anything is on the GPU: a compiler keeps frames, and what is in them,
    until the garbage is collected."""
    for strength in (1.0, torch.ones(2)):
        prox_operator.prox_operator(torch.zeros(2, 4), strength)


def _sparsegpt_block(
    grid: tuple[int, ...],
    weight: Tensor,
    mask: Tensor,
    errors: Tensor,
    upper: Tensor,
    rows: int,
    width: int,
    *strides: int,
    **options: Any,
) -> None:
    """`sparsegpt_triton._block`: column by column, products rounded before they are subtracted."""
    assert grid[0] * options["ROWS"] >= rows == len(weight)
    assert strides == tuple(each.stride(0) for each in (weight, mask, upper))
    assert weight.stride(1) == mask.stride(1) == upper.stride(1) == 1
    group, pivots = options["GROUP"], upper.diagonal()
    pattern = Pattern.parse(f"{group - options['PRUNED']}:{group}" if group else "unstructured:0.5")
    for at in range(width):
        if group and at % group == 0:
            here = slice(at, at + group)
            score = weight[:, here].square() / pivots[here].square()
            mask[:, here] = keep_mask(pattern, score)
        errors[:, at] = weight[:, at].masked_fill(mask[:, at], 0) / pivots[at]
        weight[:, at].masked_fill_(~mask[:, at], 0)
        weight[:, at + 1 :].sub_(errors[:, at, None] * upper[at, at + 1 :])


def _double(grid: tuple[int, ...], source: Tensor, target: Tensor, **options: Any) -> None:
    """`trial_triton._double`."""
    assert grid[0] * options["BLOCK"] == source.numel()
    target.copy_(2 * source)


# By module and name of the kernel. The arguments are the kernel's, tensors by their CPU tensors.
STAND_INS: dict[str, Callable[..., None]] = {
    "prox_triton._operator": _prox_operator,
    "sparsegpt_triton._block": _sparsegpt_block,
    "trial_triton._double": _double,
}


class _Kernel:
    """A function under `triton.jit`."""

    def __init__(self, function: Callable[..., Any], record: Record) -> None:
        module = function.__module__.rpartition(".")[2]
        self.name, self.record = f"{module}.{function.__name__}", record

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            sizes = grid(options) if callable(grid) else grid
            assert all(0 < size <= _LARGEST_GRID for size in sizes), f"{self.name}: grid {sizes}"
            for value in (*args, *options.values()):
                if isinstance(value, Tensor) and not isinstance(value, GpuTensor):
                    raise WrongDevice(f"{self.name}: Pointer argument cannot be accessed: cpu")
            if self.name not in STAND_INS:
                raise NotImplementedError(
                    f"{__name__} has no stand-in for the kernel {self.name}: add one to STAND_INS"
                )
            self.record.launches[self.name] += 1
            tensors = [value for value in args if isinstance(value, Tensor)]
            self.record.moved += sum(value.nbytes for value in tensors)
            if not self.record.data:
                return
            inner = [value.inner if isinstance(value, GpuTensor) else value for value in args]
            with _disable_current_modes():  # what the stand-in computes is no work of the CPU
                STAND_INS[self.name](sizes, *inner, **options)

        return launch


class _Language(ModuleType):
    """`triton.language`: its names are looked up while kernels are declared, and not used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object()


class _Finder(MetaPathFinder, Loader):
    """Triton is found, as the product asks, but who imports it now is told that it is not there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name == "triton" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        raise ImportError("the fake GPU has no Triton but for the kernels of the product")


def _stub(record: Record) -> dict[str, ModuleType]:
    """Modules by name."""
    triton, language = ModuleType("triton"), _Language("triton.language")
    vars(triton).update(
        language=language,
        jit=lambda function: _Kernel(function, record),
        cdiv=lambda number, divisor: -(-number // divisor),
        next_power_of_2=lambda number: 1 << (number - 1).bit_length(),
    )
    return {"triton": triton, "triton.language": language}


@contextlib.contextmanager
def triton_stub(record: Record) -> Iterator[None]:
    """Kernels of the product are imported with the stub at the start, and dropped at the end."""
    _compile_stand_ins()
    names = [name for name in sys.modules if name.split(".")[0] == "triton"]
    before = {name: sys.modules.pop(name) for name in names}
    _forget_kernels()
    stub, finder = _stub(record), _Finder()
    sys.modules.update(stub)
    for module in pkgutil.iter_modules(kernels.__path__):
        if module.name.endswith("_triton"):
            importlib.import_module(f"{kernels.__name__}.{module.name}")
    for name in stub:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update(before)
        _forget_kernels()


def _forget_kernels() -> None:
    """Drops kernels that were imported, and what the product has kept of them."""
    for name in list(sys.modules):
        if name.startswith(f"{kernels.__name__}.") and name.endswith("_triton"):
            vars(kernels).pop(name.rpartition(".")[2], None)
            del sys.modules[name]
    for module in [m for name, m in sys.modules.items() if name.startswith("pipeline.solvers")]:
        for name, value in list(vars(module).items()):
            if "triton" in name and hasattr(value, "cache_clear"):
                value.cache_clear()
