"""Dispatch over Ray: the `Executor` whose ranks are actors, and how lost ones are replaced."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.network import choose_backend, require_reachable
from actors.worker import RankActor, Whereabouts
from cluster.dispatch.connection import connect
from cluster.dispatch.failures import is_of_the_worker, translate
from cluster.dispatch.placement import (
    Placement,
    choose_placement,
    pack,
    placement_after_loss,
)
from cluster.dispatch.reservation import Reservation, free_rooms, growth_requested, reserve
from cluster.dispatch.scratch_nodes import Node, spread
from cluster.dispatch.visibility import require_shared_view
from pipeline.config.runtime import RuntimeConfig
from pipeline.loop.rank import Call, Rank, call
from pipeline.messages import Job, Outcome
from storage.errors import DeviceFaultError, Prox24Error, ResourceError, WorkerLostError
from storage.run.shared_folders import marked

logger = logging.getLogger(__name__)

T = TypeVar("T")

_START_SECONDS = 300.0
# How long the other ranks are waited for after the first error: to report the error that matters,
# and because a rank that comes to its end is kept, where one that is busy must be replaced.
_GRACE_SECONDS = 3.0
# Two readings of one process's start agree to this; another process of its id started later.
_SAME_START_SECONDS = 2.0
# How often the nodes are looked at while something is waited for that a lost node holds up.
_LOOK_SECONDS = 1.0


class _NodeLost(Exception):
    """A node that held a rank is gone: its bundle cannot be filled again."""


@dataclass
class _Rank:
    """One rank's actor, and what is known of its process. `fresh`: it has no job yet."""

    actor: Any
    fresh: bool = True
    where: Whereabouts | None = None
    device: str = ""
    joined: bool = False


class RayExecutor:
    """Ranks as Ray actors in a packed placement group. Restarts are ours: Ray's lose the state."""

    def __init__(self, config: RuntimeConfig, note: Callable[[str], None] = logger.warning) -> None:
        """Connects to the cluster (or starts one) and decides the placement.

        `note` is told what the user should know while nothing goes on. Raises `ResourceError` for
        an address that does not answer, or for more than the cluster has.
        """
        ours = connect(config)
        try:
            self.placement: Placement = choose_placement(
                config.workers,
                config.threads,
                config.gpus_per_worker,
                ray.nodes(),
                may_grow=not ours,
            )
        except ResourceError:
            ray.shutdown()
            raise
        self._wanted = self.placement
        self.threads = self.placement.threads
        self._config, self._note = config, note
        self._timeout = config.phase_timeout
        self._job: Job | None = None
        self._ranks: list[_Rank | None] = []
        self._reserved: Reservation | None = None
        # The nodes whose scratch the ranks wrote to.
        self._scratch_nodes: list[Node] = []
        # Whether all ranks have once been there: before that no node was lost.
        self._ran = False

    @property
    def world(self) -> int:
        """Number of ranks; another one after `recover` where a node was lost for good."""
        return self.placement.workers

    def prepare(self) -> None:
        """Places the actors, if that is not done: they import torch while the driver reads the
        text.

        Not for ranks that go back to nodes which only the job knows. Raises `ResourceError` where
        the cluster makes no room.
        """
        if self._ranks:
            return
        self._ranks = [None] * self.world
        self._reserved = reserve(self.placement, self._config.placement_timeout, self._note)
        for rank in range(self.world):
            self._ranks[rank] = _Rank(self._place(rank))
            self._actor(rank).warm_up.remote()

    def prepare_if_free(self) -> None:
        """`prepare` where nothing has to be waited for: before it is known whether there is a job
        at all."""
        if pack(self.placement, free_rooms()) is not None:
            self.prepare()

    def start(self, job: Job) -> None:
        """Places the actors, if that is not done, builds their ranks, and joins them."""
        self._job, self._scratch_nodes = job, list(job.scratch_nodes)
        if not all(rank is not None and rank.fresh for rank in self._ranks) or not self._ranks:
            self._restart()
            return
        try:
            self._fill()
        except _NodeLost:
            self._restart()

    def run(self, calls: Sequence[Call[T]]) -> list[Outcome[T]]:
        """One phase on all ranks at once."""
        running = {rank: self._actor(rank).perform.remote(each) for rank, each in enumerate(calls)}
        return list(self._collect(running, calls[0].phase, self._timeout).values())

    def reduce(self) -> list[Outcome[None]]:
        """The ranks sum among themselves; no statistic passes through the driver."""
        return self.run([call(Rank.reduce)] * self.world)

    def recover(self) -> None:
        """Replaces lost ranks and joins all in a new collective; survivors keep their processes.

        Where a node is lost, waits for room as `--on-lost-node` says and starts all ranks anew,
        perhaps fewer. Raises `WorkerLostError` when a rank is lost meanwhile, `ResourceError`
        when the wait is over.
        """
        if self._job is None:
            return
        if self._lost_nodes():
            self._restart()
            return
        if any(r is not None and r.device == "cuda" for r in self._ranks) and self.world > 1:
            # A NCCL communicator whose peer died may hold kernels that never end.
            for rank in range(self.world):
                self._drop(rank)
        try:
            self._fill()
        except _NodeLost:
            self._restart()

    def workers(self) -> list[dict[str, Any]]:
        """Who runs the ranks, for the records: host, process id and Ray's node id of each."""
        return [
            {
                "host": r.where.host,
                "address": r.where.address,
                "pid": r.where.pid,
                "node": r.where.node,
                "node_address": r.where.node_address,
            }
            for r in self._ranks
            if r is not None and r.where is not None
        ]

    def close(self) -> None:
        """Stops the actors; a cluster of our own ends with them."""
        with contextlib.suppress(RayError):
            self._stop_actors()
        ray.shutdown()

    def _restart(self) -> None:
        """All ranks anew, on the nodes that there are."""
        self._stop_actors()
        if self._ran:
            self.placement = self._room()
        self._ranks = [None] * self.world
        before = spread(self._scratch_nodes, self.world)
        timeout = self._config.placement_timeout
        self._reserved = reserve(self.placement, timeout, self._note, before)
        try:
            self._fill()
        except _NodeLost as error:
            raise WorkerLostError("phase start: a node is gone") from error

    def _room(self) -> Placement:
        """The placement to go on with; waits for lost nodes as the options say."""
        began, noted = time.monotonic(), False
        with contextlib.ExitStack() as waiting:
            while True:
                waited = time.monotonic() - began
                placement = placement_after_loss(
                    self._wanted,
                    self.placement,
                    ray.nodes(),
                    waited=waited,
                    node_wait=self._config.node_wait,
                    on_lost_node=self._config.on_lost_node,
                )
                if placement is not None:
                    if placement.workers < self.placement.workers:
                        self._note(f"going on with {placement.workers} of {self.world} workers")
                    return placement
                if not noted:
                    noted = True
                    waiting.enter_context(growth_requested(self._wanted))
                    self._note(
                        f"a node is lost, and the others have no room for {self.world} workers; "
                        f"waiting {self._config.node_wait:g} s for it (--node-wait)"
                    )
                time.sleep(_LOOK_SECONDS)

    def _fill(self) -> None:
        """Makes the ranks that are missing, then joins all. `_NodeLost` if a bundle's node goes."""
        timeout = _START_SECONDS
        # One that an attempt left half made counts as missing: its errors were not collected. So
        # does one whose joining failed: torch counts groups in each process, and they must agree.
        missing = [rank for rank, r in enumerate(self._ranks) if r is None or not r.joined]
        for rank in missing:
            known = self._ranks[rank]
            if known is None or not known.fresh:
                self._drop(rank)
                self._ranks[rank] = _Rank(self._place(rank))
            self._known(rank).fresh = False
            self._actor(rank).assign.remote(self._job)
        built = self._build(missing)
        for rank, device in self._collect(built, "start", timeout, watch=True).items():
            self._known(rank).device = device
        devices = [self._known(rank).device for rank in range(self.world)]
        backend = choose_backend(devices, self.placement.gpus, self._config.collective)
        host, port = self._collect({0: self._actor(0).host.remote()}, "start", timeout)[0]
        nodes, joining = len({r.where.node for r in self._ranks if r and r.where}), {}
        for rank in range(self.world):
            self._known(rank).joined = False
            joining[rank] = self._actor(rank).join.remote(host, port, backend, self._timeout, nodes)
        for rank in self._collect(joining, "start", timeout):
            self._known(rank).joined = True
        self._ran = True
        if self._job is not None and self._job.scratch is not None:
            self._scratch_nodes = [
                (worker["node"], worker["node_address"]) for worker in self.workers()
            ]

    def _build(self, missing: Sequence[int]) -> dict[int, Any]:
        """Learns where the new ranks are and what they see; returns their calls of `build`."""
        timeout = _START_SECONDS
        shared = self._job.shared if self._job is not None else ()
        with marked(shared) as marks:
            asked = {rank: self._actor(rank).where.remote() for rank in missing}
            checks = {rank: self._actor(rank).check_folders.remote(marks) for rank in missing}
            built = {rank: self._actor(rank).build.remote() for rank in missing}
            for rank, where in self._collect(asked, "start", timeout, watch=True).items():
                self._known(rank).where = where
            places = {n: r.where for n, r in enumerate(self._ranks) if r is not None and r.where}
            unseen = self._collect(checks, "start", timeout, watch=True)
            require_shared_view(marks, unseen, places)
        require_reachable([place.address for place in places.values()])
        return built

    def _place(self, rank: int) -> Any:
        options = {
            "num_cpus": self.placement.threads,
            "num_gpus": self.placement.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self._held().group,
                placement_group_bundle_index=self._held().bundles[rank],
            ),
        }
        return ray.remote(RankActor).options(**options).remote(rank, self.world)

    def _known(self, rank: int) -> _Rank:
        known = self._ranks[rank]
        if known is None:
            raise WorkerLostError(f"worker {rank} is gone")
        return known

    def _actor(self, rank: int) -> Any:
        return self._known(rank).actor

    def _name(self, rank: int) -> str:
        """A rank for people."""
        where = self._known(rank).where
        if where is None:
            return f"worker {rank}"
        return f"worker {rank} (process {where.pid} on {where.host}, {where.address})"

    def _lost_nodes(self) -> set[str]:
        """Nodes of the placement group's bundles that do not live any more."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        return set(self._reserved.nodes) - alive if self._reserved is not None else set()

    def _held(self) -> Reservation:
        if self._reserved is None:
            raise WorkerLostError("the workers' placement group is gone")
        return self._reserved

    def _stop_actors(self) -> None:
        for rank in range(len(self._ranks)):
            self._drop(rank)
        self._ranks = []
        if self._reserved is not None:
            self._reserved.release()
            self._reserved = None

    def _drop(self, rank: int) -> None:
        """Ends a rank's process, whatever it does.

        Ray asks a worker to exit and kills one that does not after some seconds. A stopped process
        cannot answer; where it runs beside this driver it is killed at once.
        """
        dropped, self._ranks[rank] = self._ranks[rank], None
        if dropped is None:
            return
        with contextlib.suppress(RayError):
            ray.kill(dropped.actor)
        where = dropped.where
        if where is not None and where.node == ray.get_runtime_context().get_node_id():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(where.pid)
                if abs(process.create_time() - where.started) < _SAME_START_SECONDS:
                    process.kill()

    def _collect(
        self, calls: dict[int, Any], phase: str, timeout: float, *, watch: bool = False
    ) -> dict[int, Any]:
        """Results by rank. The first error ends the wait; of several the telling one is raised.

        Ranks whose process is gone, or that are still busy then, are dropped. `watch`: raises
        `_NodeLost` when a node of the group is gone, for calls that would wait for it.
        """
        deadline = time.monotonic() + timeout
        ranks = {call: rank for rank, call in calls.items()}
        pending, errors = list(calls.values()), list[tuple[int, Exception]]()
        lost: set[int] = set()
        while pending:
            left = max(deadline - time.monotonic(), 0.0)
            step = min(left, _LOOK_SECONDS) if watch else left
            ready, pending = ray.wait(pending, num_returns=1, timeout=step)
            if not ready:
                if watch and self._lost_nodes():
                    raise _NodeLost
                if left > step:
                    continue
                break
            try:
                ray.get(ready[0])
            except (RayError, Prox24Error) as error:
                rank = ranks[ready[0]]
                of_worker = is_of_the_worker(error)
                translated = translate(error, phase, self._name(rank))
                translated.__cause__ = error
                if not isinstance(translated, Prox24Error):
                    translated.add_note(f"(phase {phase}, {self._name(rank)})")
                # A peer's death is seen by all who speak with it: the dead one's error tells more.
                errors.append((2 * isinstance(translated, WorkerLostError) + of_worker, translated))
                if not of_worker or isinstance(translated, DeviceFaultError):
                    lost.add(rank)
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        busy = {ranks[call] for call in pending}
        if busy and not errors:
            names = ", ".join(self._name(rank) for rank in sorted(busy))
            option = "" if phase == "start" else " (--phase-timeout)"
            message = f"phase {phase}: not finished in {timeout:.0f} s{option}: {names}"
            errors.append((0, WorkerLostError(message)))
        for rank in lost | busy:
            self._drop(rank)
        if errors:
            raise min(errors, key=lambda pair: pair[0])[1]
        return {rank: ray.get(call) for rank, call in calls.items()}
