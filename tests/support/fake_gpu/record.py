"""What happened on the fake GPU: waits, kernels, copies, matrix products, bytes."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor

from tests.support.fake_gpu.streams import Streams

# Folders whose code is named as the place where something happened, the innermost call first.
_OURS = ("/storage/", "/pipeline/", "/actors/", "/cluster/", "/transformers/")
_TOTAL = 80 * 2**30


# Not named: it multiplies for whoever calls it.
_FOR_OTHERS = "/pipeline/runtime/products.py"


@dataclass(frozen=True)
class Product:
    """A matrix product. place: `pipeline/x/y.py:12`. function: its name in that file, with its
    class. dtype: of the operands. tf32: whether TF32 was allowed and the operands were fp32. exact:
    whether TF32 represents all operands exactly."""

    place: str
    function: str
    dtype: torch.dtype
    tf32: bool = False
    exact: bool = True


@dataclass
class Record:
    """Counts since the start, or since `clear`.

    waits: the host waited for the device, by (kind, place). kernels: operators that launch one, by
    name. copied: bytes to the GPU ("up") and from it ("down"). products: operations (2 m n k) of
    matrix products. launches: Triton kernels, by name. on_cpu: operators that no tensor on the GPU
    had a part in, by place. live, peak: bytes of all tensors on the GPU
    now, and at most. total: bytes of the GPU; more of them raise `torch.OutOfMemoryError`.
    collective: backend of torch.distributed that the process has joined with. streams: see
    `tests.support.fake_gpu.streams`. pinned, most_pinned: bytes of all
    pinned host memory now, and at most.
    Also attention, by dtype: operations of attention; factored, by dtype: of small factorizations
    and triangular solves; moved: bytes that all other kernels read and write; highest: the largest
    `peak` since `clear`, which a reset of torch's peaks does not change.
    data: False for tensors without data (see `without_data`).
    """

    total: int = _TOTAL
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    copied: Counter[str] = field(default_factory=Counter)
    products: Counter[Product] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    on_cpu: Counter[str] = field(default_factory=Counter)
    collective: str | None = None
    attention: Counter[torch.dtype] = field(default_factory=Counter)
    factored: Counter[torch.dtype] = field(default_factory=Counter)
    moved: int = 0
    live: int = 0
    peak: int = 0
    pinned: int = 0
    most_pinned: int = 0
    streams: Streams = field(default_factory=Streams)
    highest: int = 0
    data: bool = True
    _storages: set[int] = field(default_factory=set)
    _pinned: set[int] = field(default_factory=set)

    def clear(self) -> None:
        """Starts all counts again; tensors that are alive stay counted."""
        for counts in vars(self).values():
            if isinstance(counts, Counter):
                counts.clear()
        self.peak = self.highest = self.live
        self.moved = 0

    def wait(self, kind: str, times: int = 1) -> None:
        """The host waits for the current stream."""
        self.count_wait(kind, times)
        self.streams.host_waits(self.streams.current)

    def count_wait(self, kind: str, times: int = 1) -> None:
        """Counts that the host waits."""
        self.waits[kind, place()] += times

    def pin(self, tensor: Tensor) -> Tensor:
        """Counts the memory of a CPU tensor as pinned until it is freed."""
        storage = tensor.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        self._pinned.add(number)
        self.pinned += size
        self.most_pinned = max(self.most_pinned, self.pinned)
        weakref.finalize(storage, self._unpin, number, size)
        return tensor

    def _unpin(self, number: int, size: int) -> None:
        self._pinned.discard(number)
        self.pinned -= size

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a CPU tensor, or what it is a view of, is in pinned memory."""
        return tensor.untyped_storage()._cdata in self._pinned

    def waits_of(self, *kinds: str) -> int:
        """Number of waits of these kinds; of all if none is named."""
        return sum(n for (kind, _), n in self.waits.items() if not kinds or kind in kinds)

    def hold(self, inner: Tensor) -> None:
        """Counts the memory of a tensor until it is freed; views share it."""
        storage = inner.untyped_storage()
        number, size = storage._cdata, storage.nbytes()
        if not size or number in self._storages:
            return
        if self.live + size > self.total:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has a total "
                f"capacity of {self.total / 2**30:.2f} GiB of which "
                f"{(self.total - self.live) / 2**20:.2f} MiB is free."
            )
        self._storages.add(number)
        self.streams.created(number)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.highest = max(self.highest, self.live)
        weakref.finalize(storage, self._free, number, size)

    def _free(self, number: int, size: int) -> None:
        self._storages.discard(number)
        self.streams.freed(number)
        self.live -= size


def place() -> str:
    """`file:line` of the innermost frame of this repository's or transformers' code."""
    return _place()[0]


def place_and_function() -> tuple[str, str]:
    """`place`, and the qualified name of the function there."""
    return _place()


def _place() -> tuple[str, str]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if "/tests/" not in file and not file.endswith(_FOR_OTHERS):
            for folder in _OURS:
                _, found, rest = file.rpartition(folder)
                if found and ("site-packages" not in file or folder == "/transformers/"):
                    name = frame.f_code.co_qualname
                    return f"{folder[1:]}{rest}:{frame.f_lineno}", name
        frame = frame.f_back
    return "elsewhere", ""
