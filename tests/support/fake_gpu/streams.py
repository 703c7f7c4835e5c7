"""Streams and events of the fake GPU: copies are done as late as CUDA may do them.

A copy between pinned memory and the GPU that does not block waits in its stream's queue. It is done
when something orders it: the next operator on its stream, an event that is waited for, a wait of
the host. Until then its target has bytes of 0xFF, which are NaN. What is copied is what the source
holds by then. All other operators are done at once.

`NotWaited` is raised where an operator uses what was written on another stream that its own has not
waited for, and where it uses memory of another stream that does not know of it (`record_stream`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class NotWaited(RuntimeError):
    """A tensor is used on one stream while another may still write to it, or after it was freed."""


class Queue:
    """One stream. step: how many operators it was given. seen: by stream, up to which step it has
    waited for it."""

    def __init__(self) -> None:
        self.step = 0
        self.seen: dict[Queue, int] = {}
        self.pending: deque[tuple[int, Callable[[], None]]] = deque()

    def drain(self, step: int) -> None:
        """Does the copies up to a step."""
        while self.pending and self.pending[0][0] <= step:
            self.pending.popleft()[1]()

    def wait_for(self, other: Queue, step: int, seen: dict[Queue, int]) -> None:
        """What comes now on this stream comes after the other's operators up to `step`."""
        other.drain(step)
        for queue, number in {**seen, other: step}.items():
            self.seen[queue] = max(self.seen.get(queue, 0), number)


class Streams:
    """The streams of one GPU, and who last wrote to each storage."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.queues: list[Queue] = []
        self.default = self.new()
        self._host = Queue()
        self._local = threading.local()
        self._written: dict[int, tuple[Queue, int]] = {}
        self._users: dict[int, set[Queue]] = {}

    def new(self) -> Queue:
        """One more stream."""
        self.queues.append(Queue())
        return self.queues[-1]

    @property
    def current(self) -> Queue:
        """The calling thread's stream."""
        return getattr(self._local, "queue", self.default)

    @current.setter
    def current(self, queue: Queue) -> None:
        self._local.queue = queue

    def created(self, storage: int) -> None:
        """A storage was allocated and written to on the current stream."""
        self._written[storage] = self.current, self.current.step
        self._users[storage] = {self.current}

    def freed(self, storage: int) -> None:
        """A storage is gone."""
        self._written.pop(storage, None)
        self._users.pop(storage, None)

    def record_stream(self, tensor: Tensor, queue: Queue) -> None:
        """`tensor`'s memory is used on that stream, too."""
        self._users.setdefault(_number(tensor), set()).add(queue)

    def begin(self, used: Iterable[Tensor], changed: Iterable[Tensor], *, late: bool) -> None:
        """An operator on the current stream. used, changed: CPU tensors of the GPU's.

        late: it is a copy that is put into the queue.
        """
        queue = self.current
        with self.lock:
            for tensor in used:
                number = _number(tensor)
                writer, step = self._written.get(number, (queue, 0))
                known = max(queue.seen.get(writer, 0), self._host.seen.get(writer, 0))
                if writer is not queue and known < step:
                    raise NotWaited("used on a stream that has not waited for what wrote it")
                if queue not in self._users.get(number, {queue}):
                    raise NotWaited("used on a stream for which record_stream was not called")
            queue.step += 1
            if not late:
                queue.drain(queue.step)
            for tensor in changed:
                self._written[_number(tensor)] = queue, queue.step

    def put(self, work: Callable[[], None]) -> None:
        """Puts a copy into the current stream's queue; `begin` came before."""

        def alone() -> None:
            with _disable_current_modes():
                work()

        with self.lock:
            self.current.pending.append((self.current.step, alone))

    def host_waits(self, queue: Queue, step: int | None = None) -> None:
        """The host waits for a stream, up to a step."""
        with self.lock:
            self._host.wait_for(queue, queue.step if step is None else step, queue.seen)

    def host_waits_for_all(self) -> None:
        """The host waits for the device."""
        for queue in self.queues:
            self.host_waits(queue)


def poison(tensor: Tensor) -> None:
    """Fills a CPU tensor with bytes of 0xFF."""
    with _disable_current_modes():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        else:
            tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


def _number(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def stream_types(record: Any) -> tuple[type, type, Any]:
    """`torch.cuda.Stream` and `Event`, and the default stream."""
    streams: Streams = record.streams

    class Event:
        """torch.cuda.Event: a place in a stream's queue, once recorded."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.at: tuple[Queue, int, dict[Queue, int]] | None = None

        def record(self, stream: Any = None) -> None:
            queue = streams.current if stream is None else stream.queue
            with streams.lock:
                self.at = queue, queue.step, dict(queue.seen)

        def wait(self, stream: Any = None) -> None:
            queue = streams.current if stream is None else stream.queue
            if self.at is not None:
                with streams.lock:
                    queue.wait_for(*self.at)

        def query(self) -> bool:
            return self.at is None or all(step > self.at[1] for step, _ in self.at[0].pending)

        def synchronize(self) -> None:
            record.count_wait("synchronize")
            if self.at is not None:
                streams.host_waits(self.at[0], self.at[1])

        def elapsed_time(self, end: Any) -> float:
            return 0.001

    class Stream:
        """torch.cuda.Stream."""

        def __init__(self, device: Any = None, *, queue: Queue | None = None, **options: Any):
            self.queue = streams.new() if queue is None else queue

        def wait_event(self, event: Event) -> None:
            event.wait(self)

        def wait_stream(self, other: Stream) -> None:
            with streams.lock:
                self.queue.wait_for(other.queue, other.queue.step, other.queue.seen)

        def record_event(self, event: Event | None = None) -> Event:
            event = Event() if event is None else event
            event.record(self)
            return event

        def query(self) -> bool:
            return not self.queue.pending

        def synchronize(self) -> None:
            record.count_wait("synchronize")
            streams.host_waits(self.queue)

    return Stream, Event, lambda: Stream(queue=streams.current)
