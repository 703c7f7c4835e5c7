"""The log of a worker's process: every line says which rank, block and phase it comes from."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

FORMAT = "%(asctime)s %(levelname)s rank %(rank)s block %(block)s %(phase)s: %(name)s: %(message)s"
# Our own loggers tell what goes on; those of libraries only what is wrong.
_OURS = ("storage", "pipeline", "actors")


class WorkerLog(logging.Filter):
    """Where this rank is, added to every record of its process, whoever logs it."""

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
        """Names the phase, and its block, which phases of a block have as first argument.

        `advance` of a block also observes the next one, whose statistics are then reduced.
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
    """Has everything that is logged in this process written to `stream`, by default stderr.

    Ray keeps a worker's stderr in its session's logs, shows it on the dashboard, and forwards it
    to the driver where `--verbose` asks for that. Warnings of libraries are logged as well.
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
