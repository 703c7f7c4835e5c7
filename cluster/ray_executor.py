"""Dispatch over Ray: the `Executor` whose ranks are actors, and the connection to a cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.worker import RankActor
from cluster.placement import Placement, choose_placement
from pipeline.config import RuntimeConfig
from pipeline.job import Job, Outcome
from storage.errors import Prox24Error, ResourceError, WorkerLostError

_START_SECONDS = 300.0
# How long the other ranks' errors are waited for after the first, to report the one that matters.
_GRACE_SECONDS = 3.0
# How long a cluster may take to accept a connection.
_KNOCK_SECONDS = 10.0


class RayExecutor:
    """Ranks as Ray actors in a packed placement group. Restarts are ours: Ray's lose the state."""

    def __init__(self, config: RuntimeConfig) -> None:
        """Connects to the cluster (or starts one) and decides the placement.

        Raises `ResourceError` for an address that does not answer, or for more than the cluster
        has.
        """
        connect(config)
        try:
            self.placement: Placement = choose_placement(
                config.workers, config.threads, config.gpus_per_worker, ray.nodes()
            )
        except ResourceError:
            ray.shutdown()
            raise
        self.world, self.threads = self.placement.workers, self.placement.threads
        self._timeout = config.phase_timeout
        self._job: Job | None = None
        self._actors: list[Any] = []
        self._group: Any = None

    def start(self, job: Job) -> None:
        """Places the actors, builds their ranks, and joins them in a collective."""
        self._stop_actors()
        self._job = job
        self._group = placement_group(
            [self.placement.bundle()] * self.world, strategy="PACK", name="prox24"
        )
        if not self._group.wait(_START_SECONDS):
            raise ResourceError(
                f"the cluster did not make room for {self.world} workers ({self.placement.text()} "
                f"each) in {_START_SECONDS:.0f} s; free: {ray.available_resources()}"
            )
        remote = ray.remote(RankActor)
        self._actors = [
            remote.options(
                num_cpus=self.placement.threads,
                num_gpus=self.placement.gpus,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group, placement_group_bundle_index=rank
                ),
            ).remote(job, rank, self.world)
            for rank in range(self.world)
        ]
        self._collect([actor.build.remote() for actor in self._actors], "start", _START_SECONDS)
        host, port = self._collect([self._actors[0].host.remote()], "start", _START_SECONDS)[0]
        joining = [actor.join.remote(host, port, self._timeout) for actor in self._actors]
        self._collect(joining, "start", _START_SECONDS)

    def run(self, phase: str, arguments: Sequence[tuple[Any, ...]]) -> list[Outcome]:
        """One phase on all ranks at once."""
        calls = [
            actor.perform.remote(phase, *own)
            for actor, own in zip(self._actors, arguments, strict=True)
        ]
        outcomes: list[Outcome] = self._collect(calls, phase, self._timeout)
        return outcomes

    def reduce(self) -> list[Outcome]:
        """The ranks sum among themselves; no statistic passes through the driver."""
        return self.run("reduce", [()] * self.world)

    def recover(self) -> None:
        """Starts all ranks anew: a block is redone from committed inputs, so none has state."""
        if self._job is not None:
            self.start(self._job)

    def close(self) -> None:
        """Stops the actors; a cluster of our own ends with them."""
        with contextlib.suppress(RayError):
            self._stop_actors()
        ray.shutdown()

    def _stop_actors(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(RayError):
                ray.kill(actor)
        self._actors = []
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None

    def _collect(self, calls: list[Any], phase: str, timeout: float) -> list[Any]:
        """Results in order. The first error ends the wait; of several the telling one is raised."""
        deadline = time.monotonic() + timeout
        pending, errors = list(calls), list[Exception]()
        while pending:
            left = deadline - time.monotonic()
            ready, pending = ray.wait(pending, num_returns=1, timeout=max(left, 0.0))
            if not ready:
                if errors:
                    break
                raise WorkerLostError(
                    f"phase {phase}: {len(pending)} of {len(calls)} workers did not finish in "
                    f"{timeout:.0f} s (--phase-timeout)"
                )
            try:
                ray.get(ready[0])
            except (RayError, Prox24Error) as error:
                errors.append(translate(error, phase))
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if errors:
            raise min(errors, key=lambda error: isinstance(error, WorkerLostError))
        return [ray.get(call) for call in calls]


def translate(error: Exception, phase: str) -> Exception:
    """Ray's report of a failure as prox24's own error."""
    if isinstance(error, OutOfMemoryError):
        return ResourceError(
            f"phase {phase}: Ray's memory monitor stopped a worker; lower --batch-size, use fewer "
            "workers on a node, or nodes with more memory"
        )
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, Exception) else error
    if isinstance(error, (ActorDiedError, ActorUnavailableError)):
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return WorkerLostError(f"phase {phase}: a worker is gone ({first})")
    if isinstance(error, RayError):
        return WorkerLostError(f"phase {phase}: {type(error).__name__}")
    return error


def connect(config: RuntimeConfig) -> None:
    """Connects to `--ray-address`, $RAY_ADDRESS, or a Ray of our own.

    Raises `ResourceError` for an address that does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    level = logging.INFO if config.verbose else logging.ERROR
    options: dict[str, Any] = {"log_to_driver": config.verbose, "logging_level": level}
    if not config.verbose:
        logging.getLogger("ray").setLevel(logging.ERROR)
    if address is None:
        # More workers than cores may be asked for: the placement says no, not Ray's scheduler.
        ray.init(address="local", include_dashboard=False, **options)
        return
    try:
        _knock(address)
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ResourceError(
            f"no Ray cluster answers at {address} ({first}); start one, or leave --ray-address out "
            "to use this machine"
        ) from error


def _knock(address: str) -> None:
    """Raises `OSError` where nothing listens at HOST:PORT: Ray itself tries on for minutes.

    Addresses without a port (`auto`) are Ray's to resolve.
    """
    host, _, port = address.rpartition("//")[2].partition("?")[0].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_SECONDS).close()
