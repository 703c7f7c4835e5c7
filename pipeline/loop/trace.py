"""`--trace`: what every worker did when, as a file for Perfetto or chrome://tracing.

The Trace Event Format's JSON array, of complete events with times in microseconds. It is written
as the job goes on, one line an event, and the format lets a reader do without the closing
bracket: the trace of a job that died shows how far it came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pipeline.loop.executor import Executor
from pipeline.loop.rank import Call
from pipeline.messages import Job, Outcome
from storage.errors import OutputError

T = TypeVar("T")

_DRIVER = 0


class TraceFile:
    """An open trace. Process 0 is the driver, process r + 1 is rank r."""

    def __init__(self, path: Path) -> None:
        """Begins a new trace. Raises `OutputError` where the file cannot be written."""
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"--trace {path}: {error.strerror}; name a file") from error
        self._file.write("[\n")
        self._named: set[int] = set()

    def span(
        self, process: int, name: str, start: float, seconds: float, details: dict[str, Any]
    ) -> None:
        """One piece of work of a process; `start` in seconds since the epoch."""
        if process not in self._named:
            self._named.add(process)
            label = "driver" if process == _DRIVER else f"rank {process - 1}"
            self._write(name="process_name", ph="M", pid=process, tid=0, args={"name": label})
        self._write(
            name=name,
            ph="X",
            pid=process,
            tid=0,
            ts=round(start * 1e6, 1),
            dur=round(seconds * 1e6, 1),
            args=details,
        )

    def flush(self) -> None:
        """Lets readers see what was written."""
        self._file.flush()

    def close(self) -> None:
        """Ends the trace."""
        self._file.write("{}]\n")
        self._file.close()

    def _write(self, **event: Any) -> None:
        self._file.write(json.dumps(event) + ",\n")


class TracingExecutor:
    """Another executor, and a trace of what it runs."""

    def __init__(self, executor: Executor, path: Path) -> None:
        self._executor, self._trace = executor, TraceFile(path)

    @property
    def world(self) -> int:
        """The ranks of the executor."""
        return self._executor.world

    @property
    def threads(self) -> int:
        """The threads of each of its ranks."""
        return self._executor.threads

    def workers(self) -> list[dict[str, Any]]:
        """Who runs the ranks."""
        return self._executor.workers()

    def prepare(self) -> None:
        """Begins to make the ranks."""
        self._driver("prepare", {}, self._executor.prepare)

    def start(self, job: Job) -> None:
        """Has the ranks note when they do what."""
        self._driver(
            "start", {}, lambda: self._executor.start(dataclasses.replace(job, trace=True))
        )

    def run(self, calls: Sequence[Call[T]]) -> list[Outcome[T]]:
        """Runs the phase, and writes what the ranks did in it."""
        first = calls[0]
        details = {} if first.block is None else {"block": first.block}
        return self._phase(first.phase, details, lambda: self._executor.run(calls))

    def reduce(self) -> list[Outcome[None]]:
        """Sums the statistics, and writes what the ranks did."""
        return self._phase("reduce", {}, self._executor.reduce)

    def recover(self) -> None:
        """Replaces lost ranks."""
        self._driver("recover", {}, self._executor.recover)

    def close(self) -> None:
        """Lets go of the ranks and ends the trace."""
        self._executor.close()
        with contextlib.suppress(OSError):
            self._trace.close()

    def _phase(
        self, phase: str, details: dict[str, Any], work: Callable[[], list[Outcome[T]]]
    ) -> list[Outcome[T]]:
        outcomes: list[Outcome[T]] = []
        self._driver(phase, details, lambda: outcomes.extend(work()))
        for rank, outcome in enumerate(outcomes):
            for kind, start, seconds in outcome.events:
                name = phase if kind == "" else kind
                self._trace.span(rank + 1, name, start, seconds, details)
        self._trace.flush()
        return outcomes

    def _driver(self, name: str, details: dict[str, Any], work: Callable[[], None]) -> None:
        start, began = time.time(), time.perf_counter()
        try:
            work()
        finally:
            seconds = time.perf_counter() - began
            self._trace.span(_DRIVER, name, start, seconds, details | {"pid": os.getpid()})
            self._trace.flush()


def traced(executor: Executor, path: str | None) -> Executor:
    """The executor itself, or with `--trace` one that also writes `path`."""
    return executor if path is None else TracingExecutor(executor, Path(path))
