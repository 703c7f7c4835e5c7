"""Who runs the ranks: all that the block loop knows of a cluster."""

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
        """Begins to make the ranks before there is a job, where that takes time; may be left out.

        Raises `ResourceError` where there is no place for them.
        """
        ...

    def start(self, job: Job) -> None:
        """Makes the ranks, before anything else; again, for another job, in place of the first."""
        ...

    def run(self, calls: Sequence[Call[T]]) -> list[Outcome[T]]:
        """Runs one phase on all ranks, `calls[rank]` each; outcomes in rank order.

        Raises `WorkerLostError` when a rank is gone or hangs, and a rank's own error as it is.
        """
        ...

    def reduce(self) -> list[Outcome[None]]:
        """Gives every rank the sum, in rank order, of all ranks' statistics."""
        ...

    def recover(self) -> None:
        """Replaces ranks that are gone, and drops what an abandoned attempt left in the others.

        Raises `WorkerLostError` when another is lost meanwhile, `ResourceError` when there is no
        place for them.
        """
        ...

    def workers(self) -> list[dict[str, Any]]:
        """Who runs the ranks, as JSON for the records: `host`, `pid` and what else is known."""
        ...

    def close(self) -> None:
        """Lets go of the ranks. Never raises because one of them is already gone."""
        ...
