"""Real processes for tests, forked from one that has torch and transformers already.

Starting Python and importing both takes five seconds and more; a fork of a process that has them
takes none, and is as real a process to send signals to.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil

from tests.support.injection import Injection, arm

CONTEXT = multiprocessing.get_context("forkserver")
# One list for all tests: there is one fork server a session.
CONTEXT.set_forkserver_preload(
    [
        "__main__",
        "cluster.command_line",
        "pipeline.prune",
        "pipeline.evaluation.perplexity",
        "tests.support.warm",
    ]
)
PATIENCE = 120.0
# Starting a process also looks after all others, and an exit status can be read only once.
_TABLE = threading.Lock()


def until(condition: Callable[[], Any], what: str = "it") -> Any:
    """The condition's first true value; fails if there is none in two minutes."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} does not happen"
        time.sleep(0.005)
    return value


def _run(
    arguments: list[str],
    log: str,
    environment: dict[str, str],
    injection: Injection | None,
    lock_options: dict[str, float],
    within: Callable[[], AbstractContextManager[Any]],
    first: Callable[[], object] | None,
) -> None:
    from cluster.command_line import run
    from pipeline.records import live_status

    os.setsid()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if lock_options:
        shorter: Any = functools.partial(live_status.RunLock, **lock_options)
        live_status.RunLock = shorter  # type: ignore[misc]
    if injection is not None:
        arm(injection)
    if first is not None:
        first()
    with within():
        status = run(arguments)
    os._exit(status & 0xFF)


class Driver:
    """`prox24 ARGUMENTS` in a process of its own, a session leader.

    lock_options: of its `RunLock`, where tests cannot wait for the usual ones. within: what the
    command runs in, such as `fake_gpu`. first: what the process does before the command; pickled on
    the way there.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        log: Path,
        environment: dict[str, str] | None = None,
        *,
        injection: Injection | None = None,
        lock_options: dict[str, float] | None = None,
        within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        first: Callable[[], object] | None = None,
    ) -> None:
        self.log = log
        strings = [str(argument) for argument in arguments]
        self.process: Any = CONTEXT.Process(
            target=_run,
            args=(
                *(strings, str(log), environment or {}, injection, lock_options or {}),
                *(within, first),
            ),
        )
        with _TABLE:
            self.process.start()

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    @property
    def running(self) -> bool:
        with _TABLE:
            return bool(self.process.is_alive())

    def send(self, number: signal.Signals) -> None:
        """A signal, to the driver alone; it may be gone already."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit status, negative for the signal that ended it."""
        deadline = time.monotonic() + PATIENCE
        while self.running:
            assert time.monotonic() < deadline, f"the driver does not end: {self.errors()}"
            time.sleep(0.005)
        return int(self.process.exitcode)

    def errors(self) -> str:
        """What it has written to standard error."""
        return Path(f"{self.log}.err").read_text(encoding="utf-8")

    def output(self) -> str:
        """What it has written to standard output."""
        return Path(f"{self.log}.out").read_text(encoding="utf-8")

    def session(self) -> list[psutil.Process]:
        """Live processes of its session: the driver and what it started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.pid and process.status() != "zombie":
                    found.append(process)
        return found

    def end(self) -> None:
        """Kills it and what it started, if anything is left."""
        for process in self.session():
            with contextlib.suppress(psutil.Error):
                process.kill()
        until(lambda: not self.running, "its end")


def prox24(arguments: Sequence[str | Path], log: Path) -> Driver:
    """Runs the command to its end."""
    driver = Driver(arguments, log)
    driver.wait()
    return driver
