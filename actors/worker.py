"""The Ray worker: one rank of a job in a process of its own."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from actors.logs import open_log
from actors.metrics import Meter
from pipeline.collective import Collective, host_meeting
from pipeline.job import Job, Outcome
from pipeline.measure import reset_peaks
from pipeline.worker import BlockWorker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Whereabouts:
    """The process of a rank: Ray's node id, host name, process id and its start (unix time)."""

    node: str
    host: str
    pid: int
    started: float


class RankActor:
    """Holds a `BlockWorker` and its place in the collective. The driver makes it a Ray actor."""

    def __init__(self, job: Job, rank: int, world: int) -> None:
        self.job, self.rank, self.world = job, rank, world
        self._store: Any = None
        self._log = open_log(rank)
        self._meter = Meter(Path(job.run_directory).name)

    def where(self) -> Whereabouts:
        """Which process this is."""
        return Whereabouts(
            node=ray.get_runtime_context().get_node_id(),
            host=socket.gethostname(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
        )

    def build(self) -> str:
        """Makes the rank; returns the type of its device.

        Apart from the constructor, whose errors Ray reports as a dead actor.
        """
        self.worker = BlockWorker(self.job, self.rank, self.world)
        return self.worker.device.type

    def host(self) -> tuple[str, int]:
        """Rank 0 only: opens a meeting point on a fresh port; returns its address."""
        host = ray.util.get_node_ip_address()
        self._store = host_meeting(host)
        return host, self._store.port

    def join(self, host: str, port: int, timeout: float) -> None:
        """Joins the collective; every operation in it then waits `timeout` seconds at most.

        Again after a peer was lost: what the abandoned attempt left in this rank is dropped.
        """
        if self.worker.collective is not None:
            self.worker.collective.close()
            self.worker.collective = None
        self.worker.forget()
        self.worker.watch.take()
        use_interface_of(ray.util.get_node_ip_address())
        backend = "nccl" if self.worker.device.type == "cuda" and self.world > 1 else "gloo"
        if self._store is not None:
            self.worker.collective = Collective(
                self.rank, self.world, self._store, backend, timeout
            )
        else:
            self.worker.collective = Collective.join(
                self.rank, self.world, host, port, backend, timeout
            )

    def perform(self, phase: str, *arguments: Any) -> Outcome:
        """Runs one phase of the rank; its peaks of memory are the phase's own."""
        with self._log.during(phase, arguments):
            logger.info("begins")
            reset_peaks(self.worker.device)
            try:
                outcome = self.worker.perform(phase, *arguments)
            except Exception as error:
                logger.warning("failed: %s: %s", type(error).__name__, error)
                raise
            self._meter.outcome(self.rank, outcome)
            logger.info("done: %s", _told(outcome))
        return outcome


def _told(outcome: Outcome) -> str:
    """An outcome's figures for a log: `1.3 s (forward 1.1, io 0.2), peak 312 MiB`."""
    parts = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in outcome.seconds.items())
    peak = outcome.memory["rss_bytes"] / 2**20
    return f"{sum(outcome.seconds.values()):.1f} s ({parts}), peak {peak:.0f} MiB"


def use_interface_of(address: str) -> None:
    """Has gloo and NCCL talk through the interface that other nodes reach this one by.

    By default they take the one the host name resolves to, which is often 127.0.0.1. A variable
    that the user has set wins.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
