"""Activations on node-local scratch: no byte of the result depends on what becomes of it."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.prune import PruneConfig
from pipeline.loop.rank import Call
from pipeline.messages import Job, Outcome
from pipeline.preflight.scratch import check_scratch_space
from pipeline.prune import prune
from pipeline.records.scratch import FOLDER_PREFIX
from pipeline.runtime.progress import Silent
from pipeline.worker.block_worker import BlockWorker
from pipeline.worker.local_executor import LocalExecutor
from pipeline.worker.scratch import FreeScratch
from storage.errors import ConfigError, ResourceError
from tests.support.injection import Injection
from tests.support.jobs import SMALL, contents, prune_here, write_text
from tests.support.processes import Driver
from tests.support.tiny_models import save_tiny_model

OPTIONS: dict[str, Any] = {"method": "wanda", "workers": 2}


class Notes(Silent):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


class Nodes(LocalExecutor):
    """Ranks with a scratch each, as on a node each. `before(phase, number)` sees every phase."""

    def __init__(self, names: Sequence[str], before: Callable[[str, int], None]) -> None:
        super().__init__(len(names), 1)
        self.names, self.before, self.count = names, before, 0

    def start(self, job: Job) -> None:
        self._workers = [
            BlockWorker(dataclasses.replace(job, scratch=self._of(job, name)), rank, self.world)
            for rank, name in enumerate(self.names)
        ]

    def _of(self, job: Job, name: str) -> str:
        assert job.scratch is not None
        path = Path(job.scratch)
        return str(path.parent / name / path.name)

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        if "scratch" not in calls[0].phase and "shards" not in calls[0].phase:
            self.before(calls[0].phase, self.count)
            self.count += 1
        return super().run(calls)


class Whole:
    """A model, a text, and the output of a job without scratch. `more`: options of the jobs."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.options = OPTIONS | more
        self.model = save_tiny_model(folder / "tiny", blocks=3)
        self.text = write_text(folder / "text.txt", 2048)
        options = {**self.options, "dataset": str(self.text)}
        self.expected = contents(prune_here(self.model, folder / "expected", **options).output)


class Case:
    def __init__(self, whole: Whole, folder: Path) -> None:
        self.model, self.text, self.expected = whole.model, whole.text, whole.expected
        self.options = whole.options
        self.folder, self.scratch = folder, folder / "scratch"
        self.scratch.mkdir()

    def run(
        self, names: Sequence[str] = "ab", before: Callable[[str, int], None] | None = None
    ) -> list[str]:
        """A job on these nodes; what the user was told."""
        config = PruneConfig(
            executor="local",
            **(SMALL | self.options),
            dataset=str(self.text),
            scratch_dir=str(self.scratch),
        )
        notes = Notes()
        executor = Nodes(names, before or (lambda phase, number: None))
        prune(self.model, self.folder / "out", config, lambda: executor, notes)
        return notes.notes

    def check(self) -> None:
        """The result is as without scratch, and none is left."""
        assert contents(self.folder / "out") == self.expected
        assert not list(self.scratch.glob(f"*/{FOLDER_PREFIX}*"))
        assert not (self.folder / "out.run" / "scratch.json").exists()

    def shards(self, name: str) -> list[Path]:
        return sorted(self.scratch.glob(f"{name}/{FOLDER_PREFIX}*/activations/*/*.arrow"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("scratch"))


@pytest.fixture
def case(whole: Whole, tmp_path: Path) -> Case:
    return Case(whole, tmp_path)


class Stop(Exception):
    """The job ends here."""


def test_activations_are_on_scratch_alone(case: Case) -> None:
    seen: list[tuple[int, int, int]] = []

    def look(phase: str, number: int) -> None:
        in_run = list((case.folder / "out.run").glob("activations/*/*.arrow"))
        seen.append((len(case.shards("a")), len(case.shards("b")), len(in_run)))

    assert case.run(before=look) == []
    case.check()
    assert max(seen) == (1, 1, 0), "one store between blocks, half on each node"


@pytest.mark.parametrize("lost", ["a", "b", "ab"])
def test_scratch_that_is_lost_while_the_job_is_down(case: Case, lost: str) -> None:
    def stop(phase: str, number: int) -> None:
        if phase == "solve" and number > 5:
            raise Stop

    with pytest.raises(Stop):
        case.run(before=stop)
    assert case.shards("a")
    assert case.shards("b")
    for name in lost:
        shutil.rmtree(case.scratch / name)
    phases: list[str] = []
    notes = case.run(before=lambda phase, number: phases.append(phase))
    case.check()
    assert "missing from the scratch of" in notes[0]
    if lost != "ab":
        assert "run through" in notes[0], "the other node's are used as they are"


def test_ranks_that_come_back_on_each_others_nodes(case: Case) -> None:
    def stop(phase: str, number: int) -> None:
        if phase == "solve" and number > 5:
            raise Stop

    with pytest.raises(Stop):
        case.run("ab", stop)
    assert "missing from the scratch" in case.run("ba")[0]
    case.check()


def test_scratch_that_is_lost_under_a_running_job(case: Case) -> None:
    lost: list[str] = []

    def lose(phase: str, number: int) -> None:
        if phase in ("calibrate", "advance") and phase not in lost:
            lost.append(phase)
            for path in case.shards("b"):
                path.unlink()

    assert any("missing from the scratch" in note for note in case.run(before=lose))
    case.check()


def test_damage_on_scratch_is_found_by_its_hash(case: Case) -> None:
    def flip(phase: str, number: int) -> None:
        if phase == "advance" and number > 5 and (paths := case.shards("a")):
            raw = bytearray(paths[0].read_bytes())
            raw[len(raw) // 2] ^= 1
            paths[0].write_bytes(raw)

    assert any("altered since it was written" in note for note in case.run(before=flip))
    case.check()


def test_what_another_job_left_is_deleted(case: Case) -> None:
    def stop(phase: str, number: int) -> None:
        if phase == "solve" and number > 5:
            raise Stop

    with pytest.raises(Stop):
        case.run(before=stop)
    (left,) = case.scratch.glob(f"a/{FOLDER_PREFIX}*")
    stranger = case.scratch / "a" / "of-someone-else"
    stranger.mkdir()
    shutil.rmtree(case.folder / "out.run")  # the user gives the job up
    case.run()
    case.check()
    assert not left.exists()
    assert stranger.exists()


@pytest.mark.parametrize("at", [r"after link .*activations/block-001/record", r"block-002/record"])
def test_killed_and_resumed_without_the_scratch(case: Case, at: str) -> None:
    command = [
        *("prune", case.model, case.folder / "out", "--executor", "local", "--method", "wanda"),
        *("--workers", "2", "--threads", "1", "--dataset", case.text, "--nsamples", "8"),
        *("--seqlen", "32", "--batch-size", "2", "--scratch-dir", "$PROX24_TEST_SCRATCH/a"),
        *("--reconstruct", "none"),
    ]
    environment = {"PROX24_TEST_SCRATCH": str(case.scratch)}
    injection = Injection(case.folder, at, signal.SIGKILL)
    killed = Driver(command, case.folder / "killed", environment, injection=injection)
    assert killed.wait() == -signal.SIGKILL, killed.errors()
    assert case.shards("a")
    shutil.rmtree(case.scratch / "a")
    resumed = Driver(command, case.folder / "resumed", environment)
    assert resumed.wait() == 0, resumed.errors()
    assert "missing from the scratch" in resumed.errors()
    case.check()


def test_room_on_scratch_is_looked_at_node_by_node() -> None:
    rooms = [FreeScratch(p, f"host-{p}", f"/s/{p}", 2e9, 0.0) for p in "aab"]
    check_scratch_space(rooms, 1.2e9)  # 1.6 GB on a, 0.8 GB on b
    with pytest.raises(ResourceError, match="/s/a on host-a: activations need about 2.42 GB"):
        check_scratch_space(rooms, 1.8e9)


def test_scratch_must_be_a_place_on_every_node() -> None:
    for value in ("scratch", "s3://bucket/x"):
        with pytest.raises(ConfigError, match="--scratch-dir must be"):
            PruneConfig(scratch_dir=value)
