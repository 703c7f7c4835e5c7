"""The executor without Ray: all ranks in this process, one after another."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any, TypeVar

from pipeline.loop.rank import Call, Rank, call
from pipeline.messages import Job, Outcome
from pipeline.statistics.accumulate import add_in_rank_order
from pipeline.worker.block_worker import BlockWorker
from storage.errors import DeviceFaultError, Prox24Error

T = TypeVar("T")


class LocalExecutor:
    """Runs `world` ranks in this process, one after another.

    Its results are the reference: Ray workers must give the same bytes.
    """

    def __init__(self, world: int, threads: int) -> None:
        self._world, self.threads = world, threads
        self._workers: list[BlockWorker] = []

    @property
    def world(self) -> int:
        """Number of ranks; fixed."""
        return self._world

    def prepare(self) -> None:
        """Does nothing: ranks in this process start at once."""

    def start(self, job: Job) -> None:
        """Creates the ranks."""
        self._workers = [BlockWorker(job, rank, self.world) for rank in range(self.world)]

    def run(self, calls: Sequence[Call[T]]) -> list[Outcome[T]]:
        """Runs a phase rank by rank; an error of one ends it."""
        return [_perform(worker, each) for worker, each in zip(self._workers, calls, strict=True)]

    def reduce(self) -> list[Outcome[None]]:
        """Adds the ranks' sums in rank order; all ranks then share the same statistics."""
        first, *others = self._workers
        sums = first.state.sums
        for name in list(sums) if others else ():
            parts = zip(*(worker.state.sums.pop(name) for worker in self._workers), strict=True)
            sums[name] = tuple(add_in_rank_order(halves) for halves in parts)
        outcomes = [_perform(first, call(Rank.reduce))]
        for worker in others:
            worker.state.statistics.update(first.state.statistics)
            outcomes.append(_perform(worker, call(Rank.reduce)))
        return outcomes

    def recover(self) -> None:
        """Drops the statistics of an abandoned attempt: no rank is lost without the process."""
        for worker in self._workers:
            worker.forget()

    def workers(self) -> list[dict[str, Any]]:
        """This process, once for each rank."""
        return [{"host": socket.gethostname(), "pid": os.getpid()}] * self.world

    def close(self) -> None:
        """Drops the ranks and their memory."""
        self._workers = []


def _perform(worker: BlockWorker, phase: Call[T]) -> Outcome[T]:
    """Runs a phase. A failed GPU ends the job: this process, which is all there is, has lost it."""
    try:
        return worker.perform(phase)
    except DeviceFaultError as error:
        raise Prox24Error(
            f"{error}; this process cannot use the GPU any more: run the same command again, and "
            "it goes on from the committed blocks"
        ) from error
