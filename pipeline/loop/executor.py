"""The `Executor` protocol: all that the block loop knows of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from pipeline.loop.rank import Call
from pipeline.messages import Job, Outcome

T = TypeVar("T")


class Executor(Protocol):
    """Runs phases on every rank.

    `pipeline.worker.local_executor.LocalExecutor` runs them in this process,
    `cluster.dispatch.ray_executor.RayExecutor` in Ray actors.
    """

    @property
    def threads(self) -> int:
        """CPU threads of each rank."""
        ...

    @property
    def world(self) -> int:
        """Number of ranks. `recover` may change it: read it anew for each phase."""
        ...

    def prepare(self) -> None:
        """Begins to start the ranks before there is a job, if that takes time. Optional.

        Raises `ResourceError` if there is no room for them.
        """
        ...

    def start(self, job: Job) -> None:
        """Starts the ranks; called before any phase. A second call replaces them by a new job's."""
        ...

    def run(self, calls: Sequence[Call[T]]) -> list[Outcome[T]]:
        """Runs one phase on all ranks, `calls[rank]` on each; outcomes in rank order.

        Raises `WorkerLostError` if a worker is gone or hangs; an error that a rank raised is passed
        on unchanged.
        """
        ...

    def reduce(self) -> list[Outcome[None]]:
        """Runs the phase `reduce`: every rank gets the sum of all ranks' statistics.

        The ranks are added in their order, so the sum does not depend on the network.
        """
        ...

    def recover(self) -> None:
        """Replaces lost workers, and drops the statistics of an abandoned attempt in the others.

        Raises `WorkerLostError` if another is lost meanwhile, `ResourceError` if there is no room
        for the new ones.
        """
        ...

    def workers(self) -> list[dict[str, Any]]:
        """Each rank's process, as JSON for the records: `host`, `pid`, with Ray also `node`."""
        ...

    def close(self) -> None:
        """Ends the workers. Does not raise if one of them is already gone."""
        ...
