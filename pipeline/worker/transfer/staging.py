"""Copies between the host and a GPU through pinned memory, beside the computation.

A GPU copies by itself only from and to pinned (page-locked) host memory. Here it does so on streams
of their own, piece by piece through a few buffers that are made once. So the bytes that are pinned
do not depend on what is copied, and the host fills one buffer while another is copied.

Order, without which a tensor would have other bytes: a buffer is written to again only after its
copy is done; the stream that computes waits for a copy before it uses the tensor; a copy from the
GPU waits for what has computed the tensor. On a CPU nothing is copied but where a copy is asked
for.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from pipeline.runtime.background import Background

BUFFER_BYTES = 32 * 2**20
BUFFERS = 4
PINNED_BYTES = BUFFERS * BUFFER_BYTES
"""Most bytes of host memory that a GPU worker pins."""


class Moving(Protocol):
    """A tensor on its way."""

    def tensor(self) -> Tensor:
        """The tensor, safe to use. To be called once."""
        ...


@dataclass
class _Here:
    """A tensor that needs no copy, or whose copy is done."""

    value: Tensor

    def tensor(self) -> Tensor:
        """The tensor."""
        return self.value


@dataclass
class _Arriving:
    """A tensor on the GPU that a copy still writes to, until `copied`."""

    value: Tensor
    copied: torch.cuda.Event

    def tensor(self) -> Tensor:
        """The tensor; the calling thread's stream waits for the copy, the host does not."""
        stream = torch.cuda.current_stream(self.value.device)
        stream.wait_event(self.copied)
        # Made on another stream: its memory is used again only after what this one has begun.
        self.value.record_stream(stream)
        return self.value


@dataclass
class _Leaving:
    """A tensor on the GPU, complete after `computed`, that is to be copied to the host."""

    staging: Staging
    value: Tensor
    computed: torch.cuda.Event

    def tensor(self) -> Tensor:
        """Its copy on the CPU, complete."""
        return self.staging.fetch(self.value, self.computed)


class Staging:
    """Copies from and to one device, for any number of threads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        # Buffers that no thread uses, each with the event of its last copy; None: not made yet.
        self._free: queue.SimpleQueue[tuple[Tensor | None, torch.cuda.Event | None]]
        self._free = queue.SimpleQueue()
        if self._on_gpu:
            for _ in range(BUFFERS):
                self._free.put((None, None))
            self._upward, self._downward = (
                torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                for _ in range(2)
            )

    def up(self, source: Tensor) -> Moving:
        """`source`, a CPU tensor, on the device: begins the copy. The source may change after it.

        On a CPU it is `source` itself.
        """
        if not self._on_gpu:
            return _Here(source)
        flat = _bytes_of(source)
        with torch.cuda.stream(self._upward):
            value = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        target = _bytes_of(value)
        copied = _event()
        for piece in _pieces(flat.numel()):
            with self._buffer() as (buffer, event):
                part = buffer[: piece.stop - piece.start]
                part.copy_(flat[piece])
                with torch.cuda.stream(self._upward):
                    target[piece].copy_(part, non_blocking=True)
                event.record(self._upward)
        copied.record(self._upward)
        return _Arriving(value, copied)

    def down(self, source: Tensor) -> Moving:
        """A copy of `source`, a tensor on the device, for the CPU; `source` may change after it.

        The copy to the host begins where `tensor` is called, which waits for it.
        """
        if not self._on_gpu:
            return _Here(source.to("cpu", copy=True))
        value = source.clone(memory_format=torch.contiguous_format)
        computed = _event()
        computed.record(torch.cuda.current_stream(self.device))
        return _Leaving(self, value, computed)

    def fetch(self, value: Tensor, computed: torch.cuda.Event) -> Tensor:
        """A contiguous tensor of the device as a CPU tensor, once `computed` has happened."""
        host = torch.empty(value.shape, dtype=value.dtype)
        source, target = _bytes_of(value), _bytes_of(host)
        self._downward.wait_event(computed)
        value.record_stream(self._downward)
        for piece in _pieces(target.numel()):
            with self._buffer() as (buffer, event):
                part = buffer[: piece.stop - piece.start]
                with torch.cuda.stream(self._downward):
                    part.copy_(source[piece], non_blocking=True)
                event.record(self._downward)
                event.synchronize()
                target[piece].copy_(part)
        return host

    def all_up(self, sources: Iterable[Tensor], background: Background) -> Iterator[Tensor]:
        """The tensors on the device, in order; the next ones are copied while one is used."""
        for moving in background.ahead(self.up, sources, background.threads):
            yield moving.tensor()

    def module_up(self, module: nn.Module, background: Background) -> nn.Module:
        """`module` with its tensors on the device; those on the meta device stay there."""
        if not self._on_gpu:
            return module
        owned = [
            (owner, name, value)
            for owner in module.modules()
            for named in (owner.named_parameters, owner.named_buffers)
            for name, value in named(recurse=False)
            if not _absent(value)
        ]
        # Parameters that are tied stay one.
        each = {id(value): value for _, _, value in owned}
        arrived = dict(
            zip(each, self.all_up((v.detach() for v in each.values()), background), strict=True)
        )
        parameters: dict[int, nn.Parameter] = {}
        for owner, name, value in owned:
            there = arrived[id(value)]
            if isinstance(value, nn.Parameter):
                there = parameters.setdefault(id(value), nn.Parameter(there, requires_grad=False))
            setattr(owner, name, there)
        return module

    @contextmanager
    def _buffer(self) -> Iterator[tuple[Tensor, torch.cuda.Event]]:
        """A pinned buffer of BUFFER_BYTES, whose last copy is done, and an event for its next."""
        buffer, last = self._free.get()
        event = _event()
        try:
            if buffer is None:
                buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
            if last is not None:
                last.synchronize()
            yield buffer, event
        finally:
            self._free.put((buffer, event))


def _absent(tensor: Tensor) -> bool:
    """Whether a tensor has no values, as a tensor that was not loaded."""
    return tensor.is_meta


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's values as (bytes,) uint8, without a copy if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def _pieces(size: int) -> list[slice]:
    """`size` bytes in pieces that fit a buffer."""
    return [slice(start, min(start + BUFFER_BYTES, size)) for start in range(0, size, BUFFER_BYTES)]
