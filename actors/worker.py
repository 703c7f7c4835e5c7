"""The Ray worker: one worker of a job, in a process of its own."""

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
from actors.network import choose_endpoint, local_interfaces, use_interface

# Workers are started before the driver has imported torch: modules that need it are imported in
# methods.
if TYPE_CHECKING:
    from pipeline.loop.rank import Call
    from pipeline.messages import Job, Outcome
    from storage.run.shared_folders import Marked

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Whereabouts:
    """The process of a worker.

    node: Ray's id of the node. node_address: the address by which Ray knows the node. host: its
    host name, which other nodes may have, too. address: the one by which other workers reach this
    one. pid: process id. started: start of the process, in seconds since the epoch.
    """

    node: str
    node_address: str
    host: str
    address: str
    pid: int
    started: float


class RankActor:
    """Holds a `BlockWorker` and its collective. The driver makes it a Ray actor."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._store: Any = None
        self._log = open_log(rank)

    def warm_up(self) -> None:
        """Imports what the worker computes with.

        That takes seconds, during which the driver prepares the job.
        """
        importlib.import_module("pipeline.worker.block_worker")

    def assign(self, job: Job) -> None:
        """Gives the worker its job; called before all methods below."""
        self.job = job
        self._meter = Meter(Path(job.run_directory).name)

    def where(self) -> Whereabouts:
        """Which process this is. Raises `ResourceError` if the job's interface is missing here."""
        address = ray.util.get_node_ip_address()
        self._endpoint = choose_endpoint(address, local_interfaces(), self.job.interface)
        return Whereabouts(
            node=ray.get_runtime_context().get_node_id(),
            node_address=address,
            host=socket.gethostname(),
            address=self._endpoint.address,
            pid=os.getpid(),
            started=psutil.Process().create_time(),
        )

    def check_folders(self, marks: tuple[Marked, ...]) -> list[str]:
        """What this node does not see as the driver does: see `what_is_not_seen`."""
        from pipeline.preflight.shared_folders import what_is_not_seen

        return what_is_not_seen(self.job, marks, self.rank)

    def build(self) -> str:
        """Creates the `BlockWorker`; returns the type of its device.

        Raises `ResourceError` where Ray gave this worker a GPU that torch cannot use.

        Not in the constructor, since Ray reports errors there as a dead actor.
        """
        from pipeline.runtime.device import check_given_gpus
        from pipeline.worker.block_worker import BlockWorker
        from storage.files.os_errors import file_errors

        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        check_given_gpus(gpus, self.job.device, self._endpoint.address)
        with file_errors():
            self.worker = BlockWorker(self.job, self.rank, self.world)
        return self.worker.device.type

    def host(self) -> tuple[str, int]:
        """Rank 0 only: opens the store at which the workers meet; returns its address and port."""
        from pipeline.statistics.all_reduce import host_meeting

        self._store = host_meeting(self._endpoint.address)
        return self._endpoint.address, self._store.port

    def join(self, host: str, port: int, backend: str, timeout: float, nodes: int = 1) -> None:
        """Joins the collective of all workers. timeout: the most seconds that an operation waits.
        nodes: how many nodes hold the workers.

        Called again after a worker was lost; the state of the abandoned attempt is dropped.
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
                self.rank, self.world, self._store, backend, timeout, nodes
            )
        else:
            self.worker.collective = Collective.join(
                self.rank, self.world, host, port, backend, timeout, nodes
            )

    def perform(self, phase: Call[T]) -> Outcome[T]:
        """Runs one phase, and measures its peak memory."""
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
            logger.info("done: %s", _summary(outcome))
        return outcome


def _summary(outcome: Outcome[Any]) -> str:
    """Time and memory of a phase for the log: `1.3 s (forward 1.1, io 0.2), peak 312 MiB`."""
    parts = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in outcome.seconds.items())
    peak = outcome.memory["rss_bytes"] / 2**20
    return f"{sum(outcome.seconds.values()):.1f} s ({parts}), peak {peak:.0f} MiB"
