"""Measures time and memory: one stopwatch per worker, peaks of memory read from the system.

A worker also counts (`Stopwatch.count`): `tokens` that blocks were run on, `solved_weights`, bytes
that were moved (`activations_read_bytes`, `activations_written_bytes`, `weights_read_bytes`,
`slices_read_bytes`, `slices_written_bytes`, `output_written_bytes`, and to other workers
`statistics_sent_bytes`, `inverses_sent_bytes` and `training_sent_bytes`), and `statistics_bytes`,
the size of the sums. Bytes are those of tensors or files: reading a file again to compare its hash
does not count.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Stopwatch:
    """Seconds by kind of work. Nested timings are exclusive: the outer one excludes the inner one.

    On a GPU each start and end waits for what the thread has begun there, so that kernels count as
    the right kind. Copies that other threads have begun go on.
    With `trace` each interval is kept as (kind, start in seconds since the epoch, seconds).
    """

    def __init__(self, device: torch.device, *, trace: bool = False) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.events: list[tuple[str, float, float]] = []
        self.counts: dict[str, int] = {}
        self._trace = trace
        self._running: list[tuple[str, float]] = []

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Counts the time inside as `kind`."""
        self._switch()
        self._running.append((kind, time.perf_counter()))
        try:
            yield
        finally:
            self._switch()
            self._running.pop()
            if self._running:
                self._running[-1] = (self._running[-1][0], time.perf_counter())

    def _switch(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        if self._running:
            kind, since = self._running[-1]
            elapsed = time.perf_counter() - since
            self.seconds[kind] = self.seconds.get(kind, 0.0) + elapsed
            if self._trace:
                self.events.append((kind, time.time() - elapsed, elapsed))

    def count(self, name: str, amount: int) -> None:
        """Adds `amount` to the count `name`."""
        self.counts[name] = self.counts.get(name, 0) + amount

    def take_counts(self) -> dict[str, int]:
        """The counts since the last call, by name."""
        counts, self.counts = self.counts, {}
        return counts

    def take_events(self) -> tuple[tuple[str, float, float], ...]:
        """The intervals since the last call; none without `trace`."""
        events, self.events = self.events, []
        return tuple(events)

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by kind."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def reset_peaks(device: torch.device) -> None:
    """Resets the peaks of host and device memory, where the system allows it."""
    with contextlib.suppress(OSError):
        # 5: reset the peak resident set size (proc(5)).
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def host_peak() -> int:
    """Peak resident bytes of this process since `reset_peaks`, or since its start."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_peak(device: torch.device) -> int:
    """Peak bytes that torch has allocated on a CUDA device since `reset_peaks`."""
    return int(torch.cuda.max_memory_allocated(device))


def peak_memory(device: torch.device | None = None) -> dict[str, Any]:
    """Peak resident memory of this process and peak memory of its device, in bytes.

    Since `reset_peaks`, which a Ray worker calls before each phase; else since the start.
    """
    peaks = {"rss_bytes": host_peak()}
    if device is not None and device.type == "cuda":
        peaks["device_bytes"] = device_peak(device)
    return peaks
