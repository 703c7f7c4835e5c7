"""The executor without Ray: N ranks one after another in this process."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any, TypeVar

from pipeline.loop.rank import Call, Rank, call
from pipeline.messages import Job, Outcome
from pipeline.statistics.accumulate import add_in_rank_order
from pipeline.worker.block_worker import BlockWorker

T = TypeVar("T")


class LocalExecutor:
    """N ranks one after another in this process: the oracle that Ray workers must equal."""

    def __init__(self, world: int, threads: int) -> None:
        self._world, self.threads = world, threads
        self._workers: list[BlockWorker] = []

    @property
    def world(self) -> int:
        """Number of ranks; fixed."""
        return self._world

    def prepare(self) -> None:
        """Nothing: ranks in this process need no process of their own."""

    def start(self, job: Job) -> None:
        """Makes the ranks in this process."""
        self._workers = [BlockWorker(job, rank, self.world) for rank in range(self.world)]

    def run(self, calls: Sequence[Call[T]]) -> list[Outcome[T]]:
        """One rank after the other; a rank's error ends the phase."""
        return [worker.perform(each) for worker, each in zip(self._workers, calls, strict=True)]

    def reduce(self) -> list[Outcome[None]]:
        """Adds the ranks' tensors one after another; all ranks then share one sum."""
        first, *others = self._workers
        sums = first.held.sums
        for name in list(sums) if others else ():
            parts = zip(*(worker.held.sums.pop(name) for worker in self._workers), strict=True)
            sums[name] = tuple(add_in_rank_order(halves) for halves in parts)
        outcomes = [first.perform(call(Rank.reduce))]
        for worker in others:
            worker.held.statistics.update(first.held.statistics)
            outcomes.append(worker.perform(call(Rank.reduce)))
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
