"""The Ray worker: one rank of a job in a process of its own."""

from __future__ import annotations

import importlib
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import ray

from actors.logs import open_log
from actors.metrics import Meter
from actors.network import choose_endpoint, own_interfaces, use_interface

# Workers are started before the driver has imported torch: what needs it is imported in methods.
if TYPE_CHECKING:
    from pipeline.loop.rank import Call
    from pipeline.messages import Job, Outcome
    from storage.run.shared_folders import Marked

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Whereabouts:
    """The process of a rank: Ray's node id, host name and address; process id, start (unix time).

    Host names may be alike; `address` is the one by which the ranks reach this one, `node_address`
    the one by which Ray knows the node.
    """

    node: str
    node_address: str
    host: str
    address: str
    pid: int
    started: float


class RankActor:
    """Holds a `BlockWorker` and its place in the collective. The driver makes it a Ray actor."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._store: Any = None
        self._log = open_log(rank)

    def warm_up(self) -> None:
        """Imports what a rank computes with, which takes seconds: meanwhile the driver does what
        must be done before there is a job."""
        importlib.import_module("pipeline.worker.block_worker")

    def assign(self, job: Job) -> None:
        """Gives the rank its job, before anything else is asked of it."""
        self.job = job
        self._meter = Meter(Path(job.run_directory).name)

    def where(self) -> Whereabouts:
        """Which process this is. Raises `ResourceError` for an interface that it has not."""
        address = ray.util.get_node_ip_address()
        self._endpoint = choose_endpoint(address, own_interfaces(), self.job.interface)
        return Whereabouts(
            node=ray.get_runtime_context().get_node_id(),
            node_address=address,
            host=socket.gethostname(),
            address=self._endpoint.address,
            pid=os.getpid(),
            started=psutil.Process().create_time(),
        )

    def check_folders(self, marks: tuple[Marked, ...]) -> list[str]:
        """What this node does not see as the driver does."""
        from pipeline.preflight.shared_folders import what_is_not_seen

        return what_is_not_seen(self.job, marks, self.rank)

    def build(self) -> str:
        """Makes the rank; returns the type of its device.

        Apart from the constructor, whose errors Ray reports as a dead actor.
        """
        from pipeline.worker.block_worker import BlockWorker

        self.worker = BlockWorker(self.job, self.rank, self.world)
        return self.worker.device.type

    def host(self) -> tuple[str, int]:
        """Rank 0 only: opens a meeting point on a fresh port; returns its address."""
        from pipeline.statistics.all_reduce import host_meeting

        self._store = host_meeting(self._endpoint.address)
        return self._endpoint.address, self._store.port

    def join(self, host: str, port: int, backend: str, timeout: float) -> None:
        """Joins the collective; every operation in it then waits `timeout` seconds at most.

        Again after a peer was lost: what the abandoned attempt left in this rank is dropped.
        """
        from pipeline.statistics.all_reduce import Collective

        if self.worker.collective is not None:
            self.worker.collective.close()
            self.worker.collective = None
        self.worker.forget()
        self.worker.watch.take()
        use_interface(self._endpoint, named=self.job.interface is not None)
        if self._store is not None:
            self.worker.collective = Collective(
                self.rank, self.world, self._store, backend, timeout
            )
        else:
            self.worker.collective = Collective.join(
                self.rank, self.world, host, port, backend, timeout
            )

    def perform(self, phase: Call[T]) -> Outcome[T]:
        """Runs one phase of the rank; its peaks of memory are the phase's own."""
        from pipeline.runtime.stopwatch import reset_peaks

        with self._log.during(phase.phase, phase.arguments):
            logger.info("begins")
            reset_peaks(self.worker.device)
            try:
                outcome = self.worker.perform(phase)
            except Exception as error:
                logger.warning("failed: %s: %s", type(error).__name__, error)
                raise
            self._meter.outcome(self.rank, outcome)
            logger.info("done: %s", _told(outcome))
        return outcome


def _told(outcome: Outcome[Any]) -> str:
    """An outcome's figures for a log: `1.3 s (forward 1.1, io 0.2), peak 312 MiB`."""
    parts = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in outcome.seconds.items())
    peak = outcome.memory["rss_bytes"] / 2**20
    return f"{sum(outcome.seconds.values()):.1f} s ({parts}), peak {peak:.0f} MiB"
