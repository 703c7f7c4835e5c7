"""The executor without Ray: N ranks one after another in this process."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from pipeline.messages import Job, Outcome
from pipeline.statistics.accumulate import add_in_rank_order
from pipeline.worker.block_worker import BlockWorker


class LocalExecutor:
    """N ranks one after another in this process: the oracle that Ray workers must equal."""

    def __init__(self, world: int, threads: int) -> None:
        self._world, self.threads = world, threads
        self._workers: list[BlockWorker] = []

    @property
    def world(self) -> int:
        """Number of ranks; fixed."""
        return self._world

    def start(self, job: Job) -> None:
        """Makes the ranks in this process."""
        self._workers = [BlockWorker(job, rank, self.world) for rank in range(self.world)]

    def run(self, phase: str, arguments: Sequence[tuple[Any, ...]]) -> list[Outcome]:
        """One rank after the other; a rank's error ends the phase."""
        return [
            worker.perform(phase, *own)
            for worker, own in zip(self._workers, arguments, strict=True)
        ]

    def reduce(self) -> list[Outcome]:
        """Adds the ranks' tensors one after another; all ranks then share one sum."""
        first, *others = self._workers
        for name in list(first.sums) if others else ():
            parts = zip(*(worker.sums.pop(name) for worker in self._workers), strict=True)
            first.sums[name] = tuple(add_in_rank_order(folds) for folds in parts)
        outcomes = [first.perform("reduce")]
        for worker in others:
            worker.statistics = dict(first.statistics)
            outcomes.append(worker.perform("reduce"))
        return outcomes

    def recover(self) -> None:
        """A rank in this process cannot be lost without the process."""
        for worker in self._workers:
            worker.forget()

    def workers(self) -> list[dict[str, Any]]:
        """This process, once for each rank."""
        return [{"host": socket.gethostname(), "pid": os.getpid()}] * self.world

    def close(self) -> None:
        """Drops the ranks and what they hold."""
        self._workers = []
