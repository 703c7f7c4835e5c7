"""Jobs whose ranks compute inverses together, as they do on GPUs: the bytes of one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.loop.rank import Call, Rank
from pipeline.messages import Job, Outcome
from pipeline.solvers import cost
from pipeline.worker.local_executor import LocalExecutor
from tests.support.jobs import contents, prune_here
from tests.support.teams import SECONDS, Member, Table

TinyModel = Callable[..., Path]


@dataclass
class Meeting:
    """What stands for `Collective`: teams of ranks that are threads of this process."""

    rank: int
    tables: dict[tuple[int, ...], Table]
    backend: str
    nodes: int = 1
    asked: list[tuple[int, ...]] = field(default_factory=list)

    def team(self, ranks: tuple[int, ...]) -> Member | None:
        self.asked.append(ranks)
        if self.rank not in ranks:
            return None
        table = self.tables.setdefault(ranks, Table(len(ranks)))
        return Member(ranks.index(self.rank), len(ranks), table)

    def take_sent(self) -> int:
        return 0


class Together(LocalExecutor):
    """Ranks that solve at the same time, each on a thread, and meet. meetings: of each rank."""

    def __init__(self, world: int, threads: int, backend: str = "nccl") -> None:
        super().__init__(world, threads)
        self._backend = backend

    def start(self, job: Job) -> None:
        super().start(job)
        self.tables: dict[tuple[int, ...], Table] = {}
        self.meetings = [Meeting(rank, self.tables, self._backend) for rank in range(self.world)]

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        if calls[0].phase != Rank.solve.__name__:
            return super().run(calls)
        for worker, meeting in zip(self._workers, self.meetings, strict=True):
            worker.collective = meeting  # type: ignore[assignment]
        with ThreadPoolExecutor(self.world, initializer=torch.set_num_threads, initargs=(1,)) as on:
            pairs = zip(self._workers, calls, strict=True)
            running = [on.submit(worker.perform, each) for worker, each in pairs]
            outcomes = [each.result(SECONDS) for each in running]
        for worker in self._workers:
            worker.collective = None
        return outcomes


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sending takes no time: so small inverses are computed together, too."""
    monkeypatch.setattr(cost, "_SECONDS_PER_BLOCK", 0.0)
    monkeypatch.setattr(cost, "_BYTES_IN_A_NODE", float("inf"))


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("world", [2, 3])
def test_the_bytes_are_those_of_one_rank(tiny_model: TinyModel, tmp_path: Path, world: int) -> None:
    model = tiny_model("llama", hidden=64, intermediate=320)
    expected = prune_here(model, tmp_path / "one").output
    executor = Together(world, 1)
    found = prune_here(model, tmp_path / "more", executor=executor, workers=world).output
    assert contents(found) == contents(expected)
    assert any(table.sent for table in executor.tables.values())
    asked = [meeting.asked for meeting in executor.meetings]
    assert all(each == asked[0] for each in asked), "torch numbers groups in each process"
    joined = {ranks for each in asked for ranks in each}
    assert {rank for ranks in joined for rank in ranks} == set(range(world))


@pytest.mark.usefixtures("free")
def test_ranks_that_sum_through_host_memory_repeat_inverses(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    executor = Together(2, 1, backend="gloo")
    prune_here(tiny_model("llama"), tmp_path / "output", executor=executor, workers=2)
    assert not executor.tables
    assert not any(meeting.asked for meeting in executor.meetings)
