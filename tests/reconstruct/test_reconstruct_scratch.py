"""Targets on node-local scratch: swept, and made again where they are lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.records.scratch import FOLDER_PREFIX
from tests.job.test_scratch import Case, Stop, Whole

OPTIONS: dict[str, Any] = {"reconstruct": "block", "reconstruct_epochs": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("scratch"), **OPTIONS)


@pytest.fixture
def case(whole: Whole, tmp_path: Path) -> Case:
    return Case(whole, tmp_path)


def stores(case: Case, name: str) -> list[str]:
    """The stores on a node's scratch, `area/block`."""
    shards = case.scratch.glob(f"{name}/{FOLDER_PREFIX}*/*/*/*.arrow")
    return sorted({"/".join(path.parts[-3:-1]) for path in shards})


def test_targets_are_on_scratch_alone_and_swept(case: Case) -> None:
    seen: list[list[str]] = []

    def look(phase: str, number: int) -> None:
        seen.append(stores(case, "a"))
        assert not list((case.folder / "out.run").rglob("shard-*.arrow"))

    assert case.run(before=look) == []
    case.check()
    assert any("targets/block-001" in each for each in seen)
    assert max(map(len, seen)) <= 3, seen


@pytest.mark.parametrize("phase", ["dense", "begin_training", "train"])
@pytest.mark.parametrize("lost", ["b", "ab"])
def test_scratch_that_is_lost_while_the_job_is_down(case: Case, phase: str, lost: str) -> None:
    begun: list[str] = []

    def stop(name: str, number: int) -> None:
        begun.append(name)
        if begun.count(phase) == 2:
            raise Stop

    with pytest.raises(Stop):
        case.run(before=stop)
    for name in lost:
        shutil.rmtree(case.scratch / name)
    seen: list[tuple[str, list[str]]] = []
    notes = case.run(before=lambda name, number: seen.append((name, stores(case, "a"))))
    case.check()
    assert any("missing from the scratch of" in note for note in notes)
    assert any("the targets of block" in note for note in notes)
    assert max(len(each) for _, each in seen) <= 3, seen
    if phase == "train":
        names = [name for name, _ in seen]
        assert "solve" not in names[: names.index("train")]


def test_targets_that_are_lost_under_a_running_job(case: Case) -> None:
    lost: list[str] = []

    def lose(phase: str, number: int) -> None:
        targets = list(case.scratch.glob(f"b/{FOLDER_PREFIX}*/targets/*/*.arrow"))
        if phase in ("dense", "begin_training") and targets and phase not in lost:
            lost.append(phase)
            for path in targets:
                path.unlink()

    notes = case.run(before=lose)
    case.check()
    assert lost == ["begin_training", "dense"]
    assert sum("the targets of block" in note for note in notes) == 2


def test_ranks_that_come_back_on_each_others_nodes(case: Case) -> None:
    begun: list[str] = []

    def stop(phase: str, number: int) -> None:
        begun.append(phase)
        if begun.count("begin_training") == 2:
            raise Stop

    with pytest.raises(Stop):
        case.run("ab", stop)
    assert any("the targets of block 1" in note for note in case.run("ba"))
    case.check()
