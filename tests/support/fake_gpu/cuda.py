"""`fake_gpu()`: makes torch believe in one CUDA device, until the end of the `with` statement."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.fake_gpu.record import Record
from tests.support.fake_gpu.streams import stream_types
from tests.support.fake_gpu.tensor import CUDA, GpuTensor, WrongDevice, dispatch, is_cuda
from tests.support.fake_gpu.triton_stub import triton_stub

# Places of device types in c10's table of device guards (c10/core/DeviceType.h).
_CUDA_GUARD, _META_GUARD = 1, 14
_TABLE = "_ZN3c104impl26device_guard_impl_registryE"


class _Operators(TorchDispatchMode):
    """Sees operators that make tensors on the GPU out of nothing, or of CPU tensors."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch wraps the method below, for which it imports its compiler: seconds.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return dispatch(self.record, func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Gives a `device` without a number its number, and notes which memory is pinned.

    Attention is one kernel on a GPU: the CPU's is taken for it.
    """

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        args = tuple(_numbered(value) for value in args)
        if "device" in kwargs:
            kwargs["device"] = _numbered(kwargs["device"])
        pinned = bool(kwargs.pop("pin_memory", False))
        if func is Tensor.cuda:
            return args[0].to(CUDA, **{k: v for k, v in kwargs.items() if k == "non_blocking"})
        if func is Tensor.pin_memory:
            return self.record.pin(args[0].clone())
        if func is Tensor.is_pinned:
            return self.record.is_pinned(args[0])
        if func is functional.scaled_dot_product_attention:
            return _attention(self.record, func, args, kwargs)
        made = func(*args, **kwargs)
        return self.record.pin(made) if pinned else made


class _Generator(torch.Generator):
    """Random numbers of the GPU: the CPU's."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu" if is_cuda(device) else device)


def _numbered(value: Any) -> Any:
    """`cuda` as cuda:0; what is no device as it is."""
    if value == "cuda" if isinstance(value, str) else isinstance(value, torch.device):
        return CUDA if is_cuda(value) and torch.device(value).index is None else value
    return value


def _attention(record: Record, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    on_gpu = [isinstance(tensor, GpuTensor) for tensor in tensors]
    if not any(on_gpu):
        return func(*args, **kwargs)
    if not all(on_gpu):
        raise WrongDevice("Expected query, key, value and mask to be on the same device")
    record.kernels["scaled_dot_product_attention"] += 1
    query, key, value = tensors[:3]
    share = 0.5 if kwargs.get("is_causal") else 1.0  # what is masked is not computed
    scores = query.shape[:-1].numel() * key.shape[-2]
    operations = int(2 * share * scores * (query.shape[-1] + value.shape[-1]))
    record.attention[query.dtype] += operations
    inner = [value.inner if isinstance(value, GpuTensor) else value for value in args]
    options = {k: v.inner if isinstance(v, GpuTensor) else v for k, v in kwargs.items()}
    if not record.data:  # torch would make the matrix of scores, which no kernel stores
        shape = (*query.shape[:-1], value.shape[-1])
        return GpuTensor(query.inner.new_empty(shape), record)  # type: ignore[attr-defined]
    return GpuTensor(func(*inner, **options), record)


def _patches(record: Record) -> dict[str, Any]:
    """Functions of `torch.cuda`, by name."""
    properties = SimpleNamespace(
        name="Fake H100",
        total_memory=record.total,
        uuid="00000000-0000-0000-0000-fa4e00000000",
        major=9,
        minor=0,
        multi_processor_count=132,
    )
    stream, event, current = stream_types(record)

    def synchronize(device: Any = None) -> None:
        record.count_wait("synchronize")
        record.streams.host_waits_for_all()

    @contextlib.contextmanager
    def on_stream(chosen: Any) -> Iterator[None]:
        before, streams = record.streams.current, record.streams
        streams.current = before if chosen is None else chosen.queue
        try:
            yield
        finally:
            streams.current = before

    def reset(device: Any = None) -> None:
        record.peak = record.live

    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": synchronize,
        "mem_get_info": lambda device=None: (record.total - record.live, record.total),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "memory_allocated": lambda device=None: record.live,
        "memory_reserved": lambda device=None: record.live,
        "max_memory_allocated": lambda device=None: record.peak,
        "max_memory_reserved": lambda device=None: record.peak,
        "reset_peak_memory_stats": reset,
        "empty_cache": lambda: None,
        "Stream": stream,
        "Event": event,
        "stream": on_stream,
        "current_stream": lambda device=None: current(),
        "default_stream": lambda device=None: stream(queue=record.streams.default),
    }


def _joining(record: Record) -> Any:
    """`init_process_group`, with gloo in NCCL's place."""
    join = torch.distributed.init_process_group

    def init_process_group(backend: str | None = None, **options: Any) -> None:
        record.collective = backend
        join("gloo" if backend == "nccl" else backend, **options)

    return init_process_group


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """A device guard for CUDA: indexing and `.item()` look for one before they do anything.

    A CPU build has none. The one of the meta device does nothing and serves for any device.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * (_META_GUARD + 1)).in_dll(library, _TABLE)
    before, table[_CUDA_GUARD] = table[_CUDA_GUARD], table[_META_GUARD]
    try:
        yield
    finally:
        table[_CUDA_GUARD] = before


@contextlib.contextmanager
def _modes(record: Record) -> Iterator[None]:
    with _Operators(record), _Functions(record):
        yield


@contextlib.contextmanager
def fake_gpu(**settings: Any) -> Iterator[Record]:
    """A GPU for the code inside, and for threads that are started inside; yields its record.

    settings: fields of `Record`, such as `total`, its bytes. Not for a process that has a GPU.
    """
    if torch.backends.cuda.is_built():
        raise RuntimeError("the fake GPU is for a CPU build of torch: this one has CUDA")
    record = Record(**settings)
    run = threading.Thread.run

    def with_modes(thread: threading.Thread) -> None:
        with _modes(record):
            run(thread)

    only_cpu = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_device_guard())
        for name, value in _patches(record).items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(threading.Thread, "run", with_modes))
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        joining = patch.object(torch.distributed, "init_process_group", _joining(record))
        stack.enter_context(joining)
        # `torch.tensor(..., device="cuda")` is made on the CPU, then copied.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, only_cpu)
        # `Module.to` changes parameters in place, as it does between a CPU and a GPU.
        swapping = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swapping)
        stack.enter_context(triton_stub(record))
        stack.enter_context(_modes(record))
        yield record
