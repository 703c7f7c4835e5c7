"""Workers on Ray that are lost while they reconstruct a block: it goes on from what is solved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults import Fault
from tests.support.jobs import contents, write_text
from tests.support.ray_jobs import Notes, RayJob, ray_cluster, undisturbed
from tests.support.tiny_models import save_tiny_model

BLOCKS = 3
TRAINED: dict[str, Any] = {"reconstruct": "block", "reconstruct_epochs": 2, "nsamples": 12}

Source = tuple[Path, Path, dict[str, bytes]]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ray_cluster(3) as cluster:
        yield str(cluster.address)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A model, a text, and the output's files of the job that nothing disturbs, in process."""
    folder = tmp_path_factory.mktemp("trained")
    model = save_tiny_model(folder / "model", blocks=BLOCKS)
    text = write_text(folder / "text.txt")
    return model, text, undisturbed(model, text, folder / "whole", **TRAINED)


def solves(job: RayJob, block: int) -> int:
    """How often the workers were asked to solve a block."""
    begun = [p for p in job.plan.phases() if (p["phase"], p["block"]) == ("solve", block)]
    return len([p for p in begun if p["rank"] == 0])


def test_a_worker_killed_amid_a_step(source: Source, address: str, tmp_path: Path) -> None:
    fault = Fault("train", "gradient", call=9, block=1)
    model, text, expected = source
    job = RayJob(tmp_path, model, text, address, [fault], **TRAINED)
    result = job.run()
    assert contents(job.output) == expected
    (struck,) = job.plan.struck(fault)
    assert [solves(job, block) for block in range(BLOCKS)] == [1, 1, 1]
    sent = [block["counts"] for block in result.summary["blocks"]]
    assert all(each["training_sent_bytes"] > 0 for each in sent)
    # What a training sends does not count as the next block's statistics.
    assert len({each["statistics_sent_bytes"] for each in sent}) == 1
    failures = [block["failures"] for block in result.summary["blocks"]]
    assert [len(each) for each in failures] == [0, 1, 0]
    assert f"phase train: worker 1 (process {struck['pid']} on " in failures[1][0]


@pytest.mark.slow
def test_workers_lost_in_each_block(source: Source, address: str, tmp_path: Path) -> None:
    """Amid a step, in a judgement, while rows are written; a target; each costs its block alone."""
    faults = [
        Fault("dense", "write", block=0),
        Fault("train", "gradient", call=9, block=0),
        Fault("begin_training", "load", block=1, rank=0),
        Fault("train", "judge", block=1),
        Fault("end_training", "write", block=2, rank=0),
    ]
    model, text, expected = source
    job = RayJob(tmp_path, model, text, address, faults, **TRAINED, max_attempts=9)
    result = job.run()
    assert contents(job.output) == expected
    for fault in faults:
        assert len(job.plan.struck(fault)) == 1, fault
    assert len(job.retries()) == len(faults)
    # The dense block runs before the block is solved.
    assert [solves(job, block) for block in range(BLOCKS)] == [1, 1, 1]
    failures = [block["failures"] for block in result.summary["blocks"]]
    assert [len(each) for each in failures] == [2, 2, 1]


class Stop(Exception):
    """Stands for a driver that ends."""


class StopsAt(Notes):
    """Ends the job in a phase of a block."""

    def __init__(self, phase: str, block: int) -> None:
        super().__init__()
        self.at = (phase, block)

    def phase(self, name: str, block: int | None = None) -> None:
        if (name, block) == self.at:
            raise Stop


@pytest.mark.parametrize("workers", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_other_workers_go_on_from_the_solved_slices(
    source: Source, address: str, tmp_path: Path, workers: int
) -> None:
    model, text, expected = source
    first = RayJob(tmp_path, model, text, address, [], **TRAINED)
    first.progress = StopsAt("reconstruct 2/2", 1)
    with pytest.raises(Stop):
        first.run()
    (solved,) = first.run_directory.glob("checkpoints/*/solved.json")
    assert solved.parent.name == "block-001"
    second = RayJob(
        tmp_path, model, text, address, [Fault("train", "gradient", block=7)], **TRAINED,
        workers=workers,
    )  # fmt: skip
    second.run()
    found = contents(second.output)
    weights = [name for name in found if name.endswith(".safetensors")]
    assert [name for name in weights if found[name] != expected[name]] == []
    assert [solves(second, block) for block in range(BLOCKS)] == [0, 0, 1]


PHASES = [
    Fault("dense", "write", block=1, rank=0),
    Fault("begin_training", "load", block=1),
    Fault("begin_part", "judge", block=1, rank=0),
    Fault("train", "gradient", call=3, block=1, rank=0),
    Fault("train", "judge", block=2),
    Fault("end_training", "write", block=1),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", PHASES, ids=lambda fault: fault.name)
@pytest.mark.parametrize("what", ["SIGKILL", "SIGSTOP"])
def test_every_phase(source: Source, address: str, tmp_path: Path, fault: Fault, what: str) -> None:
    fault = dataclasses.replace(fault, what=what)
    limits = {"phase_timeout": 10.0, "max_attempts": 9} if what == "SIGSTOP" else {}
    model, text, expected = source
    job = RayJob(tmp_path, model, text, address, [fault], **TRAINED, **limits)
    job.run()
    assert len(job.plan.struck(fault)) == 1
    assert contents(job.output) == expected
