"""What tests of jobs on Ray share: clusters on this machine, and jobs driven from this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from cluster.dispatch import ray_executor
from pipeline.config.prune import PruneConfig
from pipeline.prune import PruneResult, prune
from pipeline.records.tokens import CutTokens, cut_tokens
from pipeline.runtime.progress import Silent
from tests.support.faults import Fault, Plan, faulty
from tests.support.jobs import contents, prune_here

STORE_BYTES = 100 << 20
# A lost node is noticed in half a second, not in thirteen.
QUICK_TO_NOTICE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 200,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
OPTIONS: dict[str, Any] = {
    "nsamples": 8, "seqlen": 32, "batch_size": 2, "threads": 1, "workers": 2,
    "reconstruct": "none",  # test_ray_reconstruct.py loses workers in it
}  # fmt: skip


@contextmanager
def ray_cluster(cpus: int, **system: object) -> Iterator[Cluster]:
    """A Ray of one node on this machine; `system` are settings of its system config."""
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
            "_system_config": system,
        },
    )
    try:
        yield made
    finally:
        made.shutdown()


class Notes(Silent):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.failures: list[str] = []
        self.on_note: Callable[[str], None] = lambda message: None

    def attempt_failed(self, what: str, attempt: int, attempts: int, reason: str) -> None:
        self.failures.append(f"{what}: {reason}")

    def note(self, message: str) -> None:
        self.notes.append(message)
        self.on_note(message)


class RayJob:
    """A job on a cluster with planned faults, driven from this process."""

    def __init__(
        self, folder: Path, model: Path, text: Path, address: str, faults: list[Fault],
        cut: CutTokens = cut_tokens, **options: Any,
    ) -> None:  # fmt: skip
        self.folder, self.model, self.cut = folder, model, cut
        self.output, self.run_directory = folder / "output", folder / "output.run"
        self.plan = Plan(folder / "faults", faults)
        self.config = PruneConfig(dataset=str(text), ray_address=address, **(OPTIONS | options))
        self.progress = Notes()

    def run(self, start_seconds: float = 300.0) -> PruneResult:
        """The whole job. Its executor is closed, whatever happens."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray_executor, "RankActor", faulty(self.plan))
            patch.setattr(ray_executor, "_START_SECONDS", start_seconds)
            return prune(
                self.model,
                self.output,
                self.config,
                lambda: ray_executor.RayExecutor(self.config, self.progress.note),
                self.progress,
                cut=self.cut,
            )

    def retries(self) -> list[str]:
        """Why something was tried again, each time."""
        return self.progress.failures

    def seconds_lost(self, fault: Fault) -> float:
        """From the (first) strike to the first phase of the new collective."""
        struck = self.plan.struck(fault)[0]["time"]
        after = [phase for phase in self.plan.phases() if phase["time"] > struck]
        joined = min(phase["time"] for phase in after if phase["phase"] == "join")
        work = [p["time"] for p in after if p["time"] > joined and p["phase"] != "join"]
        return float(min(work) - struck)


def undisturbed(model: Path, text: Path, folder: Path, **options: Any) -> dict[str, bytes]:
    """The output's files of the same job on the local executor, where nothing goes wrong."""
    folder.mkdir()
    return contents(
        prune_here(model, folder / "output", dataset=str(text), **(OPTIONS | options)).output
    )


def gone(pid: int) -> bool:
    """Whether no process of that id runs, stopped ones included."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(pid: int, seconds: float = 30.0) -> bool:
    """Whether the process ends in that time."""
    deadline = time.monotonic() + seconds
    while not gone(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
