"""Tensors on the fake GPU: wrappers around CPU tensors, and what an operator on them may do.

`dispatch` sees every operator that a tensor on the GPU, or the device, has a part in. It refuses
what CUDA refuses, counts, and runs the operator on the wrapped CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from tests.support.fake_gpu.record import Product, Record, place, place_and_function
from tests.support.fake_gpu.streams import poison
from tests.support.fake_gpu.without_data import (
    META,
    factor_operations,
    moved_bytes,
    on_host,
    result_of,
    to_host,
    without,
)

CUDA = torch.device("cuda", 0)
_CPU = torch.device("cpu")

# Operators that read a result back, so that the host waits for the device.
_WAITING = {
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "_local_scalar_dense",
    "_unique2",
    "bincount",  # needs the largest value, to know the size of its result
    "cholesky_inverse",  # looks at its error code
    "equal",
    "is_nonzero",
    "masked_select",
    "multinomial",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_COPIES = {"copy_", "_to_copy"}
_JOINING = {"cat", "stack"}  # of CPU tensors they take not even numbers
# Matrix products: which arguments are the operands.
_PRODUCTS: dict[str, tuple[int, int]] = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0, 1),
    "dot": (0, 1),
    "addmm": (1, 2),
    "addmm_": (1, 2),
    "addmv": (1, 2),
    "addmv_": (1, 2),
    "baddbmm": (1, 2),
    "baddbmm_": (1, 2),
    "_grouped_mm": (0, 1),
}
_TF32_BITS = 13  # bits of a fp32 mantissa that TF32 does not have


class WrongDevice(RuntimeError):
    """Tensors on two devices in one operator, as CUDA refuses them."""


class GpuTensor(Tensor):
    """A tensor that says it is on cuda:0. inner: its values, on the CPU."""

    inner: Tensor
    record: Record
    # Without data: the operator that made it, and its values where a caller has stated them.
    made_by: str = ""
    stated: Tensor | None = None

    @staticmethod
    def __new__(cls, inner: Tensor, record: Record) -> GpuTensor:
        made: GpuTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CUDA,
        )
        return made

    def __init__(self, inner: Tensor, record: Record) -> None:
        record.hold(inner)
        self.inner, self.record = inner, record

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        ours = (t for _, t in tensors_in(args, kwargs or {}) if isinstance(t, GpuTensor))
        return dispatch(next(ours).record, func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GpuTensor({self.inner!r})"

    # What would read the memory of the device from the host.

    def numpy(self, *arguments: Any, **options: Any) -> NoReturn:  # type: ignore[override]
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    def __array__(self, *arguments: Any, **options: Any) -> NoReturn:  # type: ignore[override]
        self.numpy()

    def __dlpack__(self, *arguments: Any, **options: Any) -> NoReturn:  # type: ignore[override]
        raise TypeError("a CUDA tensor is handed to another library's kernels")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a CUDA tensor is pickled: whoever reads it needs a GPU, and its memory")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self.clone())

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: Any) -> None:
        self.record.streams.record_stream(self.inner, stream.queue)

    def data_ptr(self) -> int:
        if self.inner.is_meta:  # without memory: what tells storages apart, and views in them
            return self.inner.untyped_storage()._cdata + self.inner.storage_offset()
        return self.inner.data_ptr()


@dataclass(frozen=True)
class _Operator:
    """What is known of an operator. changed: numbers and names of arguments that it writes to."""

    name: str
    view: bool
    mutable: bool
    changed: frozenset[int | str]


@cache
def _operator(func: Any) -> _Operator:
    schema = func._schema
    aliases = [each.alias_info for each in schema.returns if each.alias_info is not None]
    changed: set[int | str] = set()
    for number, each in enumerate(schema.arguments):
        if each.alias_info is not None and each.alias_info.is_write:
            changed |= {number, each.name}
    return _Operator(
        schema.name.partition("::")[2],
        any(not alias.is_write for alias in aliases),
        schema.is_mutable,
        frozenset(changed),
    )


def is_cuda(device: Any) -> bool:
    """Whether a `device` argument names the GPU."""
    return device is not None and torch.device(device).type == "cuda"


def dispatch(record: Record, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs an operator of torch as the fake GPU would."""
    on_gpu = [value for _, value in tensors_in(args, kwargs) if isinstance(value, GpuTensor)]
    if func.namespace == "c10d":
        _check_collective(record, func, args, kwargs)
    target = kwargs.get("device")
    operator = _operator(func)
    if not on_gpu and not is_cuda(target):
        if not operator.view:
            record.on_cpu[place()] += 1
        return func(*args, **kwargs) if record.data else on_host(func, args, kwargs)
    if operator.name in _COPIES:
        return _copy(record, operator.name, func, args, kwargs)
    if on_gpu:
        _same_device(operator, args, kwargs)
    inner_args = tuple(map(inner, args))
    inner_kwargs = {name: inner(value) for name, value in kwargs.items()}
    if not record.data:
        inner_args, inner_kwargs = without(inner_args), without(inner_kwargs)
    if target is not None and not is_cuda(target):
        if torch.device(target).type != "meta":
            raise NotImplementedError(f"{operator.name} from cuda:0 to {target}")
        return func(*inner_args, **inner_kwargs)  # a tensor of that shape, without data
    if target is not None:
        inner_kwargs["device"] = _CPU if record.data else META
    if not operator.view:
        _begin(record, on_gpu, _changed(operator, args, kwargs))
        _count(record, operator.name, args, kwargs)
    inner_args = _as_tf32(record, operator.name, inner_args)
    if record.data:
        result = func(*inner_args, **inner_kwargs)
    else:
        result = result_of(func, operator.name, inner_args, inner_kwargs, made_by(args))
    if not operator.view and operator.name not in _PRODUCTS:
        record.moved += moved_bytes(operator.name, inner_args, inner_kwargs, result)
    return _wrapped(record, operator, on_gpu, result)


def _changed(
    operator: _Operator, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[GpuTensor]:
    """The tensors on the GPU that an operator writes to."""
    return [
        value
        for argument, value in tensors_in(args, kwargs)
        if argument in operator.changed and isinstance(value, GpuTensor)
    ]


def _begin(
    record: Record, used: Sequence[GpuTensor], changed: Sequence[GpuTensor], *, late: bool = False
) -> None:
    """An operator on the current stream: see `Streams.begin`."""
    record.streams.begin([t.inner for t in used], [t.inner for t in changed], late=late)


def made_by(args: Sequence[Any]) -> str:
    """The operator that made the first argument; "" if that is unknown."""
    return str(getattr(args[0], "made_by", "")) if args else ""


def tensors_in(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[int | str, Tensor]]:
    """Every tensor of a call, in lists too, with the number or name of its argument."""
    for argument, value in (*enumerate(args), *kwargs.items()):
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, Tensor):
                yield argument, each


def inner(value: Any) -> Any:
    """A tensor on the GPU as its CPU tensor, in lists too; anything else as it is."""
    if isinstance(value, GpuTensor):
        return value.inner
    return type(value)(map(inner, value)) if type(value) in (list, tuple) else value


def _wrapped(record: Record, operator: _Operator, on_gpu: Sequence[GpuTensor], result: Any) -> Any:
    """The result's tensors on the GPU; those that are arguments stay the arguments."""
    if operator.mutable:
        for tensor in on_gpu:
            if tensor.shape != tensor.inner.shape or tensor.stride() != tensor.inner.stride():
                raise NotImplementedError(f"{operator.name} changed a shape in place")
    known = {id(tensor.inner): tensor for tensor in on_gpu}
    wrapped = _wrap(result, known, record)
    if isinstance(wrapped, GpuTensor):
        wrapped.made_by = made_by(on_gpu) if operator.view else operator.name
    return wrapped


def _wrap(value: Any, known: Mapping[int, GpuTensor], record: Record) -> Any:
    if isinstance(value, Tensor):
        return known[id(value)] if id(value) in known else GpuTensor(value, record)
    if type(value) in (list, tuple):
        return type(value)(_wrap(each, known, record) for each in value)
    return value


def _same_device(operator: _Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises `WrongDevice` where CUDA would: only 0-d CPU tensors may take part, as numbers."""
    for argument, value in tensors_in(args, kwargs):
        if isinstance(value, GpuTensor):
            continue
        # Indices may be on the CPU: they are copied. What is indexed may not.
        if operator.name in _INDEXING and argument == 1:
            continue
        number = value.device.type == "cpu" and not value.dim()
        if not number or operator.name in _JOINING or argument in operator.changed:
            raise WrongDevice(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and {value.device}! ({operator.name}, {tuple(value.shape)})"
            )


def _check_collective(
    record: Record, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raises where NCCL is given what is not contiguous on the GPU, or gloo what is."""
    for _, value in tensors_in(args, kwargs):
        on_gpu = isinstance(value, GpuTensor)
        if on_gpu != (record.collective == "nccl"):
            raise WrongDevice(f"{func}: no backend for {value.device} in {record.collective}")
        if not value.is_contiguous():
            raise ValueError(f"{func}: Tensors must be contiguous")


def _copy(
    record: Record, name: str, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """`copy_` and `_to_copy`: the only operators that go from one device to the other."""
    values = dict(kwargs)
    if name == "copy_":
        target, source = args[0], args[1]
        there = isinstance(target, GpuTensor)
        blocking = not (args[2] if len(args) > 2 else values.get("non_blocking", False))
    else:
        source, wanted = args[0], values.get("device")
        there = isinstance(source, GpuTensor) if wanted is None else is_cuda(wanted)
        blocking = not values.get("non_blocking", False)
        if wanted is not None:
            values["device"] = _CPU
        target = None
    here = isinstance(source, GpuTensor)
    inner_args = tuple(map(inner, args))
    if not record.data:
        inner_args = without(inner_args)
        values |= {"device": META} if "device" in values else {}
    host = source if there else target
    late = here != there and not blocking and host is not None and record.is_pinned(host)
    used = [value for value in (source, target) if isinstance(value, GpuTensor)]
    _begin(record, used, [target] if isinstance(target, GpuTensor) else [], late=late)
    if late and record.data:
        result = _later(record, func, args, values, source, target)
    else:
        result = func(*inner_args, **values)
    size = result.nbytes
    if not record.data and here and not there and target is None:
        result = to_host(result, source.made_by, source.stated)
    if here and there:
        record.kernels[name] += 1
        record.moved += source.nbytes + size
    elif here:
        record.copied["down"] += size
        if not late:
            record.wait("copy from the GPU")
    elif there:
        record.copied["up"] += size
        if not late:
            record.wait("copy to the GPU")
    if target is not None:
        return target
    return GpuTensor(result, record) if there else result


def _later(
    record: Record,
    func: Any,
    args: tuple[Any, ...],
    values: dict[str, Any],
    source: Tensor,
    target: Tensor | None,
) -> Tensor:
    """Puts a copy into the current stream's queue; its target, which is garbage until then."""
    origin: Tensor = inner(source)
    into: Tensor = func(*map(inner, args), **values) if target is None else inner(target)
    poison(into)
    record.streams.put(lambda: into.copy_(origin))
    return into


def _count(record: Record, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Counts the kernel, and the wait, of an operator."""
    record.kernels[name] += 1
    waits = name in _WAITING
    if name in _INDEXING:
        waits = _finds_indices(name, args)
    elif name == "repeat_interleave":
        waits = kwargs.get("output_size") is None
    if waits:
        record.wait(name)


def _finds_indices(name: str, args: tuple[Any, ...]) -> bool:
    """Whether indexing waits: it counts the places of a mask, or copies indices to the GPU."""
    indices = [index for index in args[1] if index is not None]
    masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
    if any(not isinstance(index, GpuTensor) for index in indices):
        return True
    # A single number is written where the mask is set by a kernel that needs no places.
    written = args[2] if name.startswith(("index_put", "_index_put")) else None
    number = written is not None and written.numel() == 1 and not isinstance(written, GpuTensor)
    return bool(masks) and not number


def _as_tf32(record: Record, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Records a matrix product; returns its arguments, fp32 ones rounded if TF32 is allowed."""
    if operations := factor_operations(name, args):
        record.factored[args[0].dtype] += operations
    if name not in _PRODUCTS:
        return args
    first, second = (args[at] for at in _PRODUCTS[name])
    operations = 2 * first.numel() * (second.shape[-1] if second.dim() > 1 else 1)
    tf32 = first.dtype == torch.float32 and torch._C._get_cublas_allow_tf32()
    exact = True
    if tf32 and record.data:
        rounded = [_round_to_tf32(operand) for operand in (first, second)]
        exact = all(map(torch.equal, rounded, (first, second)))
        args = tuple(
            rounded[_PRODUCTS[name].index(at)] if at in _PRODUCTS[name] else value
            for at, value in enumerate(args)
        )
    record.products[Product(*place_and_function(), first.dtype, tf32, exact)] += operations
    return args


def _round_to_tf32(values: Tensor) -> Tensor:
    """fp32 rounded to the 10 bits of TF32's mantissa, ties away from zero."""
    bits = values.contiguous().view(torch.int32)
    rounded = (bits + (1 << (_TF32_BITS - 1))) & ~((1 << _TF32_BITS) - 1)
    return torch.where(values.isfinite(), rounded.view(torch.float32), values)
