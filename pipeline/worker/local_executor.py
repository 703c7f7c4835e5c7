"""The executor without Ray: all ranks in this process, one after another.

Where ranks wait for each other within a phase, in a reconstruction, each has a thread.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import torch

from pipeline.loop.rank import Call, Rank, call
from pipeline.messages import Job, Outcome
from pipeline.statistics.accumulate import add_in_rank_order
from pipeline.worker.block_worker import BlockWorker
from pipeline.worker.training.in_process import InProcess, Meeting
from storage.errors import DeviceFaultError, Prox24Error, WorkerLostError

T = TypeVar("T")


# Phases in which the ranks exchange gradients and weights.
_TOGETHER = frozenset(phase.__name__ for phase in (Rank.begin_part, Rank.train, Rank.end_part))


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
        pairs = list(zip(self._workers, calls, strict=True))
        if len(pairs) > 1 and calls[0].phase in _TOGETHER:
            return _perform_together(pairs)
        return [_perform(worker, each) for worker, each in pairs]

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


def _perform_together(pairs: Sequence[tuple[BlockWorker, Call[T]]]) -> list[Outcome[T]]:
    """Runs a phase of all ranks at once, each in a thread; the first error, where one fails."""
    meeting = Meeting(len(pairs))

    def work(rank: int, worker: BlockWorker, phase: Call[T]) -> Outcome[T]:
        worker.peers = InProcess(meeting, rank)
        try:
            return _perform(worker, phase)
        except BaseException:
            meeting.abandon()
            raise
        finally:
            worker.peers = None

    with ThreadPoolExecutor(len(pairs), initializer=partial(torch.set_num_threads, 1)) as pool:
        futures = [pool.submit(work, rank, *pair) for rank, pair in enumerate(pairs)]
        try:
            wait(futures)
        except BaseException:  # an interrupt of the main thread
            meeting.abandon()
            raise
    errors = [error for future in futures if (error := future.exception()) is not None]
    # What the others raise only says that one has failed.
    errors.sort(key=lambda error: isinstance(error, WorkerLostError))
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
