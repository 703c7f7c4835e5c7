"""Files of a job with --reconstruct, damaged: found, named, made again, and the same bytes.

A job that was killed in the training of its last block is resumed; `tests/job/test_corruption.py`
is about all other files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.loop.rank import Call
from pipeline.messages import Outcome
from tests.support.damage import (
    BLOCKS,
    DAMAGES,
    KINDS,
    TRAINED_KINDS,
    Interrupting,
    Notes,
    Tiny,
    copied,
    flip,
    kind_of,
    of_kind,
)
from tests.support.jobs import contents

LAST = BLOCKS - 1
TRAINED: dict[str, Any] = {"reconstruct": "block", "reconstruct_epochs": 2, "shrinkage": "0.1"}
# Gone without a trace: made as if for the first time.
UNSEEN = {("targets record", "deleted"), ("solved record", "deleted")}
QUICK = {
    ("target shard", "flipped"),
    ("target shard", "deleted"),
    ("targets record", "flipped"),
    ("targets record", "deleted"),
    ("solved record", "truncated"),
    ("solved record", "deleted"),
    ("row slices", "flipped"),
    ("row slices", "deleted"),
    ("trained slices", "flipped"),
    ("trained slices", "truncated"),
    ("block record", "flipped"),
    ("activation shard", "deleted"),
}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("tiny"), **TRAINED)


@pytest.fixture(scope="module")
def begun(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a job that was killed in the training of its last block."""
    return tiny.killed(tmp_path_factory.mktemp("begun") / "job", "train", LAST)


class Watched(Interrupting):
    """Has the phases of a job, and how many stores of activations there were at a time."""

    def __init__(self, world: int = 2, before: Callable[[str, int | None], None] | None = None):
        super().__init__(world, self._look)
        self.phases: list[tuple[str, int | None]] = []
        self.stores: list[int] = []
        self._before = before

    def _look(self, phase: str, block: int | None) -> None:
        if self._before is not None:
            self._before(phase, block)
        self.phases.append((phase, block))

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        """Counts when a phase has written, and the driver has deleted nothing yet."""
        try:
            return super().run(calls)
        finally:
            self.stores.append(stores(self.folder))

    def of(self, block: int) -> list[str]:
        return [phase for phase, number in self.phases if number == block]


def stores(run: Path) -> int:
    """Folders with activation shards, of both chains."""
    shards = [*run.glob("activations/*/*.arrow"), *run.glob("targets/*/*.arrow")]
    return len({path.parent for path in shards})


def check_left(run: Path) -> None:
    """A finished job keeps no activations and no row slices."""
    kinds = {kind_of(name) for name in contents(run)}
    assert kinds <= {"manifest", "status", "tokens", "times", "saved layer", None}
    assert not stores(run)


def test_the_job_has_every_kind_of_file(begun: Path) -> None:
    kinds = {name: kind_of(name) for name in contents(begun)}
    assert [name for name, kind in kinds.items() if kind is None] == []
    # Nothing is chosen.
    unchosen = {kind for kind in KINDS if not kind.startswith("choices")}
    assert set(kinds.values()) == unchosen | TRAINED_KINDS.keys()


def test_it_goes_on_from_the_solved_slices(tiny: Tiny, begun: Path, tmp_path: Path) -> None:
    run = copied(begun, tmp_path)
    notes, watched = Notes(), Watched()
    tiny.prune(tmp_path, notes, watched)
    tiny.check(tmp_path)
    assert notes.notes == []
    names = ["begin_training", "begin_part", "train", "train", "end_part"]
    assert watched.of(LAST) == [*names, "end_training"]
    assert not {"embed", "solve", "calibrate", "dense"} & {phase for phase, _ in watched.phases}
    check_left(run)


@pytest.mark.parametrize("workers", [1, 3])
def test_other_workers_go_on_from_the_solved_slices(
    tiny: Tiny, begun: Path, tmp_path: Path, workers: int
) -> None:
    copied(begun, tmp_path)
    notes, watched = Notes(), Watched(workers)
    tiny.prune(tmp_path, notes, watched, workers=workers)
    found = contents(tmp_path / "output")
    weights = [name for name in found if name.endswith(".safetensors")]
    assert [name for name in weights if found[name] != tiny.expected[name]] == []
    assert "solve" not in watched.of(LAST)
    assert notes.notes == []


@pytest.mark.parametrize("last", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        pytest.param(kind, damage, marks=() if (kind, damage) in QUICK else SLOW)
        for kind in (*TRAINED_KINDS, "row slices", "block record", "activation shard")
        for damage in DAMAGES
    ],
)
def test_a_stopped_job(
    tiny: Tiny, begun: Path, tmp_path: Path, kind: str, damage: str, last: bool
) -> None:
    run = copied(begun, tmp_path)
    path = of_kind(run, kind)[-1 if last else 0]
    DAMAGES[damage](path)
    notes, watched = Notes(), Watched()
    tiny.prune(tmp_path, notes, watched)
    tiny.check(tmp_path)
    if (kind, damage) not in UNSEEN:
        assert notes.name(path), notes.notes
    again = kind in ("solved record", "row slices")
    assert ("solve" in watched.of(LAST)) == again
    check_left(run)


@pytest.mark.parametrize("kind", ["trained slices", "block record"])
def test_an_older_block_is_done_again_from_the_tokens(
    tiny: Tiny, begun: Path, tmp_path: Path, kind: str
) -> None:
    run = copied(begun, tmp_path)
    path = of_kind(run, kind)[-1]
    assert path.parent.name == f"block-{LAST - 1:03d}"
    flip(path)
    notes, watched = Notes(), Watched()
    tiny.prune(tmp_path, notes, watched)
    tiny.check(tmp_path)
    assert notes.name(path)
    assert any("the same bytes as before" in note for note in notes.notes)
    assert [block for phase, block in watched.phases if phase == "dense"][:2] == [0, 1]
    assert "train" in watched.of(LAST - 1)
    assert "solve" not in watched.of(LAST)


def test_targets_that_are_lost_while_a_job_runs(tiny: Tiny, tmp_path: Path) -> None:
    """Just before the dense block reads them, and before the training does."""
    struck: list[Path] = []

    def lose(phase: str, block: int | None) -> None:
        for wanted in (("dense", 1), ("begin_training", LAST)):
            if (phase, block) == wanted and len(struck) < 1 + (wanted[1] == LAST):
                struck.append(of_kind(tmp_path / "run", "target shard")[0])
                flip(struck[-1])

    notes, watched = Notes(), Watched(before=lose)
    tiny.prune(tmp_path, notes, watched)
    tiny.check(tmp_path)
    assert len(struck) == 2
    assert all(notes.name(path) for path in struck), notes.notes
    assert max(watched.stores) <= 3, watched.stores


@pytest.mark.parametrize("target", ["dense-chain", "dense-block"])
def test_three_stores_are_the_most(tiny: Tiny, tmp_path: Path, target: str) -> None:
    """As `pipeline.preflight.disk` counts them."""
    watched = Watched()
    tiny.prune(tmp_path, None, watched, reconstruct_target=target)
    assert 2 <= max(watched.stores) <= 3, watched.stores


def test_dense_blocks_first_do_not_keep_another_store(tiny: Tiny, tmp_path: Path) -> None:
    """The chain of targets then begins late, from the tokens."""
    watched = Watched()
    tiny.prune(tmp_path, None, watched, dense_first=LAST, save_layers=None)
    assert [block for phase, block in watched.phases if phase == "dense"] == [*range(BLOCKS)]
    assert max(watched.stores) <= 3, watched.stores


def test_a_disk_without_room_for_a_repair(
    tiny: Tiny, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the job is at is deleted, so that the older block's has room."""
    run = copied(begun, tmp_path)
    flip(of_kind(run, "trained slices")[0])
    usage = shutil.disk_usage(run)
    full = type(usage)(usage.total, usage.total, 0)
    monkeypatch.setattr("pipeline.loop.repair.shutil.disk_usage", lambda _: full)
    watched = Watched()
    tiny.prune(tmp_path, None, watched, force=True)
    tiny.check(tmp_path)
    assert max(watched.stores[watched.phases.index(("embed", None)) :]) <= 3, watched.stores


def test_nothing_is_left(tiny: Tiny, tmp_path: Path) -> None:
    tiny.prune(tmp_path)
    check_left(tmp_path / "run")
    assert not list((tmp_path / "run").glob("targets/*"))
