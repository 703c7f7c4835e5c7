"""The log of a worker process: every line has the rank, the block and the phase."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

FORMAT = "%(asctime)s %(levelname)s rank %(rank)s block %(block)s %(phase)s: %(name)s: %(message)s"
# Loggers of these packages log from INFO on, those of libraries from WARNING on.
_OURS = ("storage", "pipeline", "actors")


class WorkerLog(logging.Filter):
    """Adds the rank and its current block and phase to every log record of the process."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.phase = rank, "start"
        self.block: int | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Adds the fields of `FORMAT`."""
        record.rank, record.phase = self.rank, self.phase
        record.block = "-" if self.block is None else self.block
        return True

    @contextmanager
    def during(self, phase: str, arguments: tuple[Any, ...]) -> Iterator[None]:
        """Sets the phase inside, and its block: the first argument of phases that have one.

        `advance` of a block also observes the next block, and `reduce` sums the statistics of that.
        """
        before = self.block
        self.phase = phase
        if arguments:
            self.block = arguments[0] if isinstance(arguments[0], int) else None
        try:
            yield
        finally:
            self.phase = "idle"
            if phase == "advance" and self.block is not None:
                self.block += 1
            elif not arguments:
                self.block = before


def open_log(rank: int, stream: TextIO | None = None) -> WorkerLog:
    """Writes everything that is logged in this process to `stream`, by default stderr.

    Ray stores the stderr of a worker in the logs of its session, shows it on the dashboard, and
    forwards it to the driver with `--verbose`. Python warnings are logged as well.
    """
    log = WorkerLog(rank)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.addFilter(log)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(True)
    return log
