"""Writes a job's progress to the run directory, for `prox24 status` to read."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from pipeline.runtime.progress import Progress
from storage.errors import RunDirectoryError, RunInterrupted
from storage.object_store import Place
from storage.run.directory import RunDirectory
from storage.run.lock import STAMP_DIGITS, RunLock
from storage.run.status_file import remove_status, write_status

_KEPT_FAILURES = 20


class RecordedProgress:
    """Passes every event on to `inner` and writes `status.json`.

    So the terminal and the file show the same events. Nothing is written before the first event: a
    run directory that turns out to be another job's is not changed.
    """

    def __init__(
        self, inner: Progress, run: RunDirectory, lock: RunLock, source: str, output: Place
    ) -> None:
        self._inner, self._run, self._lock = inner, run, lock
        now = time.time()
        self.written = False
        # Times are Unix times in seconds.
        self._state: dict[str, Any] = {
            "nonce": lock.nonce,
            "source": source,
            "output": str(output),
            "started": now,
            "title": None,
            "blocks": None,
            "phase": None,
            "block": None,
            "phase_started": now,
            "block_started": None,
            "around_blocks": {},
            "failures": [],
            "note": None,
            "ended": None,
            "error": None,
        }

    def begin(self, title: str, blocks: int, done: int) -> None:
        """Records what begins, and the number of blocks."""
        self._inner.begin(title, blocks, done)
        self._write(title=title, blocks=blocks)

    def phase(self, name: str, block: int | None = None) -> None:
        """Records the phase and its start, and the duration of a phase outside the blocks."""
        self._inner.phase(name, block)
        now = time.time()
        before, around = self._state["phase"], dict(self._state["around_blocks"])
        if before is not None and self._state["block"] is None:
            around[before] = around.get(before, 0.0) + now - self._state["phase_started"]
        if block is not None and self._state["block_started"] is None:
            self._state["block_started"] = now
        self._write(phase=name, block=block, phase_started=now, around_blocks=around)

    def block_done(
        self,
        block: int,
        relative_error: float | None,
        output_error: tuple[float, float] | None = None,
    ) -> None:
        """Records the start of the next block."""
        self._inner.block_done(block, relative_error, output_error)
        self._write(block_started=time.time())

    def attempt_failed(self, what: str, attempt: int, attempts: int, reason: str) -> None:
        """Records the failure; the last 20 are kept."""
        self._inner.attempt_failed(what, attempt, attempts, reason)
        failure = {
            "what": what,
            "attempt": attempt,
            "attempts": attempts,
            "reason": reason,
            "time": time.time(),
        }
        self._write(failures=[*self._state["failures"], failure][-_KEPT_FAILURES:])

    def note(self, message: str) -> None:
        """Records the latest note."""
        self._inner.note(message)
        self._write(note=message)

    def inform(self, message: str) -> None:
        """Passes the message on: what was chosen stands in `run.json`."""
        self._inner.inform(message)

    def end(self) -> None:
        """Passes the event on; `recorded` writes how the job ended."""
        self._inner.end()

    def ended(self, how: str, error: str | None = None) -> None:
        """Records the end: "finished", "interrupted" or "failed", with the error's message."""
        self._write(ended=how, error=error)

    def _write(self, **changes: Any) -> None:
        self.written = True
        self._state |= changes
        payload = {**self._state, "updated": time.time()}
        write_status(self._run.path, payload, guard=self._lock.assert_held)


@contextlib.contextmanager
def recorded(
    inner: Progress, run: RunDirectory, lock: RunLock, source: str, output: Place
) -> Iterator[RecordedProgress]:
    """A `RecordedProgress` for one run of a job, which also records how the run ends.

    The status is removed if the run ends before it has written the manifest.
    """
    progress = RecordedProgress(inner, run, lock, source, output)
    try:
        yield progress
    except BaseException as error:
        if progress.written:
            stopped = isinstance(error, RunInterrupted | KeyboardInterrupt)
            progress.ended("interrupted" if stopped else "failed", str(error) or repr(error))
        raise
    else:
        if progress.written:
            progress.ended("finished")
    finally:
        if progress.written and not run.manifest.exists():
            remove_status(run.path, guard=lock.assert_held)


@contextlib.contextmanager
def locked(run: RunDirectory, progress: Progress) -> Iterator[RunLock]:
    """Holds the run directory's lock; removes a new run directory again if a check fails.

    If another process has taken the run over, every later error is reported as that one.
    """
    new = [path for path in (run.path, *run.path.parents) if not path.exists()]
    existed = not new

    def wait(seconds: float, who: str) -> None:
        progress.note(
            f"{run.path}: in use by {who}; taking it over in {seconds:.0f} s unless its heartbeat "
            "goes on"
        )

    try:
        with RunLock(run.path, on_wait=wait) as lock:
            try:
                yield lock
            except Exception:
                try:
                    lock.assert_held()
                except RunDirectoryError:
                    run.sweep_attempts(lock.nonce[:STAMP_DIGITS])
                    raise
                raise
            finally:
                if not existed and not run.manifest.exists():
                    run.sweep_uncommitted(guard=lock.assert_held)
                    run.tokens().unlink(missing_ok=True)
                    run.scratch().unlink(missing_ok=True)
    finally:
        for path in new:
            with contextlib.suppress(OSError):  # not empty: the job has begun
                path.rmdir()
