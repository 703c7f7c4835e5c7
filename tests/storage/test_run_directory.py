"""The run directory: what counts as committed, what is swept, what differs between two jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from storage.errors import RunDirectoryError
from storage.files.commit import publish_json
from storage.files.temporary import temporary_name
from storage.run.activations import write_activation_shard, write_tokens
from storage.run.checkpoints import BlockRecord, RowSlice, write_row_slices
from storage.run.directory import SCRATCH_PREFIX, RunDirectory, differences


def write_inputs(run: RunDirectory, block: int, stamp: str, *, commit: bool) -> Path:
    path = run.activations(block) / f"shard-00000.{stamp}.arrow"
    stored = write_activation_shard(path, [torch.zeros(1, 2, 4)], block=block, index=0)
    if commit:
        payload = {"schema_version": 1, "block": block, "shards": [stored.to_json()]}
        publish_json(run.activation_record(block), payload)
    return path


def write_block(run: RunDirectory, block: int, stamp: str, *, commit: bool) -> Path:
    path = run.checkpoints(block) / f"rank-0.{stamp}.safetensors"
    stored = write_row_slices(path, {"q": RowSlice(0, torch.zeros(2, 4))})
    if commit:
        record = BlockRecord(block=block, attempt=1, world=1, files=(stored,), layers={})
        publish_json(run.record(block), record.to_json())
    return path


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def files_of(run: RunDirectory) -> set[Path]:
    return {path for path in run.path.rglob("*") if path.is_file()}


def test_paths(run: RunDirectory) -> None:
    relative = {
        run.manifest: "run.json",
        run.tokens(): "tokens.arrow",
        run.activations(7): "activations/block-007",
        run.activation_record(7): "activations/block-007/record.json",
        run.checkpoints(1234): "checkpoints/block-1234",
        run.record(7): "checkpoints/block-007/record.json",
        run.report(): "report",
    }
    assert {path.relative_to(run.path).as_posix() for path in relative} == set(relative.values())
    assert not run.path.exists()


def test_only_what_has_a_record_is_committed(run: RunDirectory) -> None:
    assert run.committed_blocks() == []
    for block in (0, 1, 999, 1000):
        write_block(run, block, "a", commit=block != 1)
    write_inputs(run, 2, "a", commit=True)
    write_inputs(run, 3, "a", commit=False)
    assert run.committed_blocks() == [0, 999, 1000]
    assert run.committed_activations() == [2]


def test_the_sweep_deletes_what_no_record_names_and_nothing_else(run: RunDirectory) -> None:
    kept = {
        write_block(run, 0, "a-1", commit=True),
        run.record(0),
        write_inputs(run, 1, "a-2", commit=True),
        run.activation_record(1),
        run.tokens(),
        run.report() / "times.json",
        run.path / "lock-1.json",
        run.path / "notes-of-the-user.txt",
    }
    run.report().mkdir()
    (run.report() / "times.json").write_text("{}")
    (run.path / "lock-1.json").write_text("{}")
    (run.path / "notes-of-the-user.txt").write_text("mine")
    write_tokens(run.tokens(), torch.ones(2, 3, dtype=torch.int64))
    scratch = run.path / f"{SCRATCH_PREFIX}1"
    scratch.mkdir()
    left = {
        scratch,
        write_block(run, 0, "zombie-1", commit=False),
        write_block(run, 1, "a-3", commit=False),
        write_inputs(run, 1, "zombie-2", commit=False),
        write_inputs(run, 2, "a-4", commit=False),
    }
    for path in (run.record(1), run.manifest):
        temporary = temporary_name(path)
        temporary.write_bytes(b"{")
        left.add(temporary)
    assert files_of(run) | {scratch} == kept | left
    assert set(run.sweep_uncommitted()) == left
    assert files_of(run) == kept
    assert run.sweep_uncommitted() == []


def test_tokens_stay_once_there_is_a_manifest(run: RunDirectory) -> None:
    write_tokens(run.tokens(), torch.ones(2, 3, dtype=torch.int64))
    publish_json(run.manifest, {"schema_version": 1})
    assert run.sweep_uncommitted() == []
    assert run.tokens().exists()


def test_a_displaced_owner_sweeps_nothing(run: RunDirectory) -> None:
    path = write_block(run, 0, "a", commit=False)

    def displaced() -> None:
        # What the successor writes after the files were listed is not among them either.
        write_block(run, 0, "b", commit=True)
        raise RunDirectoryError("the lock is another's")

    before = files_of(run)
    with pytest.raises(RunDirectoryError, match="another's"):
        run.sweep_uncommitted(displaced)
    assert files_of(run) > before
    assert path.exists()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"files": 3}', b'{"files": [{}]}', b"\xff"])
def test_files_of_an_unreadable_record_are_kept(run: RunDirectory, content: bytes) -> None:
    path = write_block(run, 0, "a", commit=True)
    other = write_block(run, 1, "a", commit=False)
    run.record(0).write_bytes(content)
    assert run.sweep_uncommitted() == [other]
    assert path.exists()


def test_files_of_a_lost_record_are_kept(run: RunDirectory) -> None:
    """Blocks are committed in order: what lies below a committed one had a record."""
    kept = [write_block(run, block, "a", commit=True) for block in range(3)]
    attempt = write_block(run, 3, "a", commit=False)
    run.record(1).unlink()
    assert run.blocks_begun() == 3
    assert run.sweep_uncommitted() == [attempt]
    assert all(path.exists() for path in kept)


def test_files_of_a_record_with_an_altered_name_are_kept(run: RunDirectory) -> None:
    path = write_block(run, 0, "a", commit=True)
    record = run.record(0).read_text().replace(path.name, "x" + path.name[1:])
    run.record(0).write_text(record)
    assert run.sweep_uncommitted() == []
    assert path.exists()


def test_a_link_out_of_the_directory_is_not_swept(run: RunDirectory, tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_text("mine")
    run.checkpoints(0).parent.mkdir(parents=True)
    run.checkpoints(0).symlink_to(outside)
    run.activations(0).parent.mkdir(parents=True)
    run.activations(0).symlink_to(outside)
    with pytest.raises(RunDirectoryError, match="outside"):
        run.sweep_uncommitted()
    with pytest.raises(RunDirectoryError, match="outside"):
        run.remove_activations(0)
    with pytest.raises(RunDirectoryError, match="outside"):
        run.remove_checkpoint(0)
    assert (outside / "file").read_text() == "mine"


def test_contained(run: RunDirectory) -> None:
    run.path.mkdir()
    (run.path / "out").symlink_to("/etc")
    inside = run.path / "checkpoints" / "x"
    assert run.contained(inside) == run.contained(Path("checkpoints/x")) == inside.resolve()
    for path in ("../x", "/etc/passwd", "out/passwd", "checkpoints/../../x"):
        with pytest.raises(RunDirectoryError, match="outside the run directory"):
            run.contained(Path(path))


def test_removing(run: RunDirectory) -> None:
    write_inputs(run, 0, "a", commit=True)
    write_inputs(run, 1, "a", commit=True)
    run.remove_activations(0)
    run.remove_activations(5)  # never there
    assert run.committed_activations() == [1]
    assert not run.activations(0).exists()
    slices = write_block(run, 0, "a", commit=True)
    run.remove_checkpoint(0)
    run.remove_checkpoint(5)
    assert run.committed_blocks() == []
    assert not slices.exists()


def test_size(run: RunDirectory) -> None:
    assert run.size() == 0
    run.report().mkdir(parents=True)
    (run.report() / "a").write_bytes(b"12345")
    (run.path / "b").write_bytes(b"123")
    assert run.size() == 8


def test_differences_are_readable() -> None:
    old = {
        "damping": 0.01,
        "solver": {"method": "prox", "steps": 20, "pattern": (2, 4)},
        "gone": None,
        "same": {"a": [1, 2]},
    }
    new = {
        "damping": 0.1,
        "solver": {"method": "prox", "steps": 30, "pattern": [2, 4]},
        "come": "x" * 200,
        "same": {"a": (1, 2)},
    }
    assert differences(old, old) == []
    found = differences(old, new)
    assert found[1:] == [
        "damping: 0.01 there, 0.1 here",
        "gone: null there, absent here",
        "solver.steps: 20 there, 30 here",
    ]
    assert found[0].startswith('come: absent there, "xxx')
    assert found[0].endswith("… here")
    assert len(found[0]) < 120
