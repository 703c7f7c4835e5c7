"""`--trace`: a timeline of every worker, as a file for Perfetto or chrome://tracing.

The file is the JSON array of the Trace Event Format: complete events, times in microseconds, one
event per line. It is written while the job runs. The format makes the closing bracket optional, so
the trace of a killed job is readable too.
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
from storage.files.os_errors import explained, file_errors

T = TypeVar("T")

_DRIVER = 0


class TraceFile:
    """An open trace. Process 0 is the driver, process r + 1 is rank r."""

    def __init__(self, path: Path) -> None:
        """Begins a new trace. Raises FileError if the file cannot be written."""
        self._path = path
        with file_errors("--trace"):
            self._file = path.open("w", encoding="utf-8")
        self._file.write("[\n")
        self._file.flush()
        self._named: set[int] = set()

    def span(
        self, process: int, name: str, start: float, seconds: float, details: dict[str, Any]
    ) -> None:
        """Adds an event of a process. `start`: seconds since the epoch; `seconds`: duration."""
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
        """Hands the events so far to the operating system, so that others can read them.

        Raises ResourceError if the disk is full.
        """
        with explained(self._path):
            self._file.flush()

    def close(self) -> None:
        """Ends the trace."""
        self._file.write("{}]\n")
        self._file.close()

    def _write(self, **event: Any) -> None:
        self._file.write(json.dumps(event) + ",\n")


class TracingExecutor:
    """Wraps an executor and traces what it runs."""

    def __init__(self, executor: Executor, path: Path) -> None:
        self._executor, self._trace = executor, TraceFile(path)

    @property
    def world(self) -> int:
        """Number of ranks of the executor."""
        return self._executor.world

    @property
    def threads(self) -> int:
        """CPU threads of each of its ranks."""
        return self._executor.threads

    def workers(self) -> list[dict[str, Any]]:
        """The executor's worker processes."""
        return self._executor.workers()

    def prepare(self) -> None:
        """Begins to start the ranks."""
        self._driver("prepare", {}, self._executor.prepare)

    def start(self, job: Job) -> None:
        """Starts the ranks with `Job.trace` set."""
        self._driver(
            "start", {}, lambda: self._executor.start(dataclasses.replace(job, trace=True))
        )

    def run(self, calls: Sequence[Call[T]]) -> list[Outcome[T]]:
        """Runs the phase and traces it."""
        first = calls[0]
        details = {} if first.block is None else {"block": first.block}
        return self._phase(first.phase, details, lambda: self._executor.run(calls))

    def reduce(self) -> list[Outcome[None]]:
        """Sums the statistics and traces that."""
        return self._phase("reduce", {}, self._executor.reduce)

    def recover(self) -> None:
        """Replaces lost workers."""
        self._driver("recover", {}, self._executor.recover)

    def close(self) -> None:
        """Ends the workers and the trace."""
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


def traced(make_executor: Callable[[], Executor], path: str | None) -> Executor:
    """The executor that the function makes; with `--trace`, one that also writes a trace to `path`.

    The file is tried first: where it cannot be written, nothing is started.
    """
    if path is None:
        return make_executor()
    TraceFile(Path(path)).close()
    return TracingExecutor(make_executor(), Path(path))
