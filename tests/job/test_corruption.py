"""Every kind of file, damaged in every way: found, named, and made again or refused.

Files of a real run directory, at a stopped job that is then resumed and in the middle of a running
one; and the files of the source model. What can be made again ends with the same bytes.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.prune import PruneConfig
from pipeline.records import live_status
from storage.errors import CorruptFileError, DataError, InputError, Prox24Error
from storage.run.checkpoints import read_block_record
from storage.run.layer_files import read_layer_file
from storage.run.lock import RunLock
from tests.support.damage import (
    BLOCKS,
    DAMAGES,
    KINDS,
    OPTIONS,
    Interrupting,
    Notes,
    Tiny,
    copied,
    empty,
    flip,
    kind_of,
    of_kind,
)
from tests.support.jobs import contents

REFUSED = {"manifest"}
# Nothing depends on them, or (the lock) they only cost time.
UNUSED = {"status", "lock", "times", "saved layer"}
# Gone without a trace: made as if for the first time.
UNSEEN = {("choices, not used yet", "deleted"), ("shards record", "deleted")}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def begun(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a job that was killed when its last block was about to be solved."""
    return tiny.killed(tmp_path_factory.mktemp("begun") / "job", "solve", BLOCKS - 1)


def cases(quick: set[tuple[str, str]]) -> list[Any]:
    """All pairs of kind and damage; those that are not `quick` for `make test-slow` only."""
    return [
        pytest.param(kind, damage, marks=() if (kind, damage) in quick else SLOW)
        for kind in KINDS
        for damage in DAMAGES
    ]


def test_every_file_of_a_run_directory_is_of_a_known_kind(begun: Path) -> None:
    """A new kind of file has to be added to `KINDS`, and so to the matrix below."""
    kinds = {name: kind_of(name) for name in contents(begun)}
    assert [name for name, kind in kinds.items() if kind is None] == []
    assert set(kinds.values()) == KINDS.keys()


STOPPED = {
    ("manifest", "flipped"),
    ("tokens", "truncated"),
    ("block record", "flipped"),
    ("row slices", "flipped"),
    ("activation shard", "flipped"),
    ("times", "emptied"),
}


@pytest.mark.parametrize("last", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize(("kind", "damage"), cases(STOPPED))
def test_a_stopped_job(
    tiny: Tiny,
    begun: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    damage: str,
    last: bool,
) -> None:
    run = copied(begun, tmp_path, lock=True)
    monkeypatch.setattr(live_status, "RunLock", functools.partial(RunLock, stale_seconds=1))
    path = of_kind(run, kind)[-1 if last else 0]
    DAMAGES[damage](path)
    if kind in REFUSED:
        refused(tiny, run, path)
        return
    notes = Notes()
    tiny.prune(tmp_path, notes)
    tiny.check(tmp_path)
    if kind not in UNUSED and (kind, damage) not in UNSEEN:
        assert notes.name(path), notes.notes
    if kind == "saved layer":
        with pytest.raises((CorruptFileError, DataError), match=path.name):
            read_layer_file(path)


def refused(tiny: Tiny, run: Path, path: Path, **options: Any) -> None:
    """The job stops before any compute, names the file, and leaves all else as it is."""
    left = contents(run / "checkpoints") | contents(run / "activations")
    with pytest.raises(InputError) as caught:
        tiny.prune(run.parent, **options)
    assert path.name in str(caught.value)
    assert contents(run / "checkpoints") | contents(run / "activations") == left
    assert not (run.parent / "output").exists()


RUNNING = {
    ("advance", 1, "row slices", "deleted"),
    ("write_output", None, "row slices", "flipped"),
}


@pytest.mark.parametrize(
    ("phase", "block", "kind", "damage"),
    [
        pytest.param(phase, block, kind, damage, marks=() if quick else SLOW)
        for phase, block in (("advance", 0), ("solve", 1), ("advance", 1), ("write_output", None))
        for kind in KINDS
        for damage in DAMAGES
        for quick in [(phase, block, kind, damage) in RUNNING]
    ],
)
def test_a_running_job(
    tiny: Tiny, tmp_path: Path, phase: str, block: int | None, kind: str, damage: str
) -> None:
    """The first file of a kind, just before a phase. It stops only where its lock is gone."""
    hit: list[Path] = []
    notes = Notes()

    def before(name: str, number: int | None) -> None:
        if (name, number if block is not None else None) == (phase, block) and not hit:
            hit.extend(of_kind(executor.folder, kind)[:1] or [Path()])
            if hit[0].name:
                DAMAGES[damage](hit[0])

    executor = Interrupting(2, before)
    if (kind, damage) == ("lock", "deleted"):
        with pytest.raises(Prox24Error, match="took the run"):
            tiny.prune(tmp_path, notes, executor)
        tiny.prune(tmp_path)
    else:
        tiny.prune(tmp_path, notes, executor)
    assert hit, f"no {phase} of block {block}"
    tiny.check(tmp_path)
    # Read by the phase that was about to begin.
    if (phase, kind) in {("advance", "activation shard"), ("write_output", "row slices")}:
        assert notes.name(hit[0]), notes.notes


def test_only_the_damaged_shard_is_replayed(tiny: Tiny, begun: Path, tmp_path: Path) -> None:
    run = copied(begun, tmp_path)
    paths = of_kind(run, "activation shard")
    before = {path: path.stat().st_ino for path in paths}
    flip(paths[1])
    phases: list[tuple[str, int | None]] = []
    seen: dict[Path, int] = {}

    def look(phase: str, block: int | None) -> None:
        phases.append((phase, block))
        if phase == "calibrate":
            seen.update({p: p.stat().st_ino for p in of_kind(run, "activation shard")})

    notes = Notes()
    tiny.prune(tmp_path, notes, Interrupting(2, look))
    tiny.check(tmp_path)
    at = phases.index(("calibrate", 2))
    assert phases[at + 1 : at + 4] == [("embed", None), ("propagate", 0), ("propagate", 1)]
    assert seen.keys() == before.keys()
    assert [p for p in paths if seen[p] != before[p]] == [paths[1]]
    assert notes.name(paths[1])


def test_a_block_redone_by_another_number_of_workers(
    tiny: Tiny, begun: Path, tmp_path: Path
) -> None:
    """Its record is replaced and says so; the later block is kept as it is."""
    run = copied(begun, tmp_path)
    kept = (run / "checkpoints/block-001/record.json").read_bytes()
    empty(run / of_kind(run, "row slices")[0])
    notes, records = Notes(), {}

    def look(phase: str, block: int | None) -> None:
        if phase == "write_output":
            for path in of_kind(run, "block record"):
                records[path.parent.name] = path.read_bytes()
                redone = read_block_record(path)
                repairs[path.parent.name] = redone.results.get("repair")

    repairs: dict[str, Any] = {}
    tiny.prune(tmp_path, notes, Interrupting(1, look), workers=1)
    assert records["block-001"] == kept
    assert repairs["block-000"]["later_blocks"] == 1
    assert repairs["block-001"] is None
    assert any("1 later blocks are kept" in note for note in notes.notes)
    assert contents(tmp_path / "output").keys() == tiny.expected.keys()


def test_damage_that_comes_back_ends_the_job(tiny: Tiny, tmp_path: Path) -> None:
    """A disk that alters what is written to it: the job stops and names the file."""

    def before(phase: str, block: int | None) -> None:
        if phase in ("advance", "calibrate"):
            flip(of_kind(executor.folder, "activation shard")[0])

    executor = Interrupting(2, before)
    with pytest.raises(CorruptFileError, match=r"shard-00000.*sha256"):
        tiny.prune(tmp_path, executor=executor)
    tiny.prune(tmp_path)
    tiny.check(tmp_path)


def test_tokens_of_another_text_are_refused(tiny: Tiny, begun: Path, tmp_path: Path) -> None:
    """The text cannot change unseen; but a tokenizer's library can."""
    run = copied(begun, tmp_path)
    flip(run / "tokens.arrow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.records.tokens.calibration_tokens", lambda *_, **__: other_tokens())
        refused(tiny, run, run / "tokens.arrow")


def other_tokens() -> Any:
    import torch

    from pipeline.text.sequences import TokenSequences

    return TokenSequences(torch.ones(12, 16, dtype=torch.int64))


def test_a_directory_without_its_manifest_is_not_taken_for_a_new_one(
    tiny: Tiny, begun: Path, tmp_path: Path
) -> None:
    """Its blocks may be any job's: with other settings they would be taken for this one's."""
    run = copied(begun, tmp_path)
    (run / "run.json").unlink()
    refused(tiny, run, run / "run.json", shrinkage="estimate")


# -- the source model ------------------------------------------------------------------------------

SOURCE = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
    "generation_config.json",
]
SOURCE_QUICK = {
    ("model-00002-of-00002.safetensors", "flipped"),
    ("tokenizer.json", "flipped"),
}


def source_cases(quick: set[tuple[str, str]]) -> list[Any]:
    return [
        pytest.param(name, damage, marks=() if (name, damage) in quick else SLOW)
        for name in SOURCE
        for damage in DAMAGES
    ]


@pytest.mark.parametrize(("name", "damage"), source_cases(SOURCE_QUICK))
def test_a_damaged_source_is_refused_on_resume(
    tiny: Tiny, begun: Path, tmp_path: Path, name: str, damage: str
) -> None:
    run = copied(begun, tmp_path)
    model = Path(shutil.copytree(tiny.model, tmp_path / tiny.model.name))
    DAMAGES[damage](model / name)
    refused(tiny, run, model / name, model=model)
    shutil.copy(tiny.model / name, model / name)
    tiny.prune(tmp_path, model=model)
    tiny.check(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage"), source_cases({("model-00001-of-00002.safetensors", "flipped")})
)
def test_a_source_that_is_damaged_while_it_is_pruned(
    tiny: Tiny, tmp_path: Path, name: str, damage: str
) -> None:
    """Nothing made from it is committed: with the file restored the job ends as undisturbed."""
    model = Path(shutil.copytree(tiny.model, tmp_path / tiny.model.name))

    def before(phase: str, block: int | None) -> None:
        if (phase, block) == ("solve", 0):
            DAMAGES[damage](model / name)

    with pytest.raises(InputError) as caught:
        tiny.prune(tmp_path, executor=Interrupting(2, before), model=model)
    assert name in str(caught.value)
    assert not (tmp_path / "output").exists()
    shutil.copy(tiny.model / name, model / name)
    tiny.prune(tmp_path, model=model)
    tiny.check(tmp_path)


def test_every_flipped_bit_of_a_weight_file_is_found(tiny: Tiny, tmp_path: Path) -> None:
    """Each tensor in turn, changed behind the job's back; none gets into the output."""
    from storage.model.files import ModelFiles, fingerprint_weight_file

    model = Path(shutil.copytree(tiny.model, tmp_path / "model"))
    files = ModelFiles.open(model)
    hashes: dict[str, str] = {}
    for file in files.files:
        hashes |= fingerprint_weight_file(model, file).tensors
    files.expected = hashes
    for name, entry in files.tensors.items():
        path = model / entry.file
        raw = bytearray(path.read_bytes())
        raw[entry.end - 1] ^= 1
        path.write_bytes(raw)
        for rows in (None, (0, 1)):
            with pytest.raises(CorruptFileError, match=f"{entry.file}: tensor {name} "):
                files.read(name, rows=rows)
        raw[entry.end - 1] ^= 1
        path.write_bytes(raw)
        files.read(name)


@pytest.mark.slow
def test_on_ray(tiny: Tiny, begun: Path, tmp_path: Path) -> None:
    """Damage that workers find reaches the driver as what it is."""
    from cluster.dispatch.ray_executor import RayExecutor

    run = copied(begun, tmp_path)
    damaged = [
        of_kind(run, "activation shard")[0],
        of_kind(run, "row slices")[1],
        of_kind(run, "block record")[1],
    ]
    for path in damaged:
        flip(path)
    notes = Notes()
    config = PruneConfig(dataset=str(tiny.text), **OPTIONS)
    tiny.prune(tmp_path, notes, RayExecutor(config))
    tiny.check(tmp_path)
    for path in damaged:
        assert notes.name(path), notes.notes
