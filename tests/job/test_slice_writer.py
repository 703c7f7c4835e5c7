"""Row slices in several files: every row once, whatever the sizes, and nothing left of an error."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.messages import SliceFile
from pipeline.records.block import read_record
from pipeline.runtime.background import Background
from pipeline.worker.transfer import slice_writer
from pipeline.worker.transfer.slice_writer import SliceWriter
from storage.errors import CorruptFileError
from storage.run.checkpoints import (
    BlockRecord,
    LayerRecord,
    LayerSlice,
    read_layer,
    verify_record,
)
from storage.run.directory import RunDirectory
from tests.support.jobs import Interrupted, StopsAt, contents, prune_here

TinyModel = Callable[..., Path]
# Layer -> (rows, columns), in bfloat16.
SHAPES = {"small": (3, 4), "large": (40, 8), "wide": (5, 100), "empty": (0, 8), "last": (1, 2)}


def layers() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()
    }


def nothing() -> None:
    """A guard that lets everything pass."""


def written(folder: Path, threads: int = 2) -> tuple[SliceFile, ...]:
    with SliceWriter(folder, 3, "abc-1", Background(threads), nothing) as writer:
        for name, weight in layers().items():
            writer.add(name, 0, weight)
        return writer.finish()


def record_of(files: tuple[SliceFile, ...]) -> BlockRecord:
    return BlockRecord(
        block=0, attempt=1, world=1, files=tuple(file.stored for file in files),
        layers={
            name: LayerRecord(
                shape=shape, dtype="BF16", results={},
                slices=tuple(
                    LayerSlice(f.stored.name, *f.ranges[name]) for f in files if name in f.ranges
                ),
            )
            for name, shape in SHAPES.items()
        },
    )  # fmt: skip


@pytest.mark.parametrize("most", [1, 16, 24, 200, 210, 640, 1 << 20])
def test_every_row_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(slice_writer, "FILE_BYTES", most)
    files = written(tmp_path)
    record = record_of(files)
    assert {path.name for path in tmp_path.iterdir()} == {file.stored.name for file in files}
    verify_record(tmp_path, record, threads=3)
    for name, weight in layers().items():
        assert torch.equal(read_layer(tmp_path, record, name), weight)
    row = 2 * max(columns for _, columns in SHAPES.values())
    for file in files:
        held = sum(2 * SHAPES[n][1] * (b - a) for n, (a, b) in file.ranges.items())
        assert held <= max(most, row)
    total = sum(2 * rows * columns for rows, columns in SHAPES.values())
    assert (len(files) == 1) == (most >= total)


def test_the_files_do_not_depend_on_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slice_writer, "FILE_BYTES", 100)
    one, many = written(tmp_path / "one", 1), written(tmp_path / "many", 4)
    assert one == many
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_files_are_written_while_others_are_solved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time: each waits until the other one has begun."""
    monkeypatch.setattr(slice_writer, "FILE_BYTES", 64)
    both, write = threading.Barrier(2), slice_writer.write_row_slices

    def slowly(path: Path, slices: Any) -> Any:
        both.wait(60)
        return write(path, slices)

    monkeypatch.setattr(slice_writer, "write_row_slices", slowly)
    with SliceWriter(tmp_path, 0, "abc-1", Background(2), nothing) as writer:
        writer.add("layer", 0, layers()["large"][:8])
        assert len(writer.finish()) == 2


def test_an_error_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_writer, "FILE_BYTES", 64)
    with (
        pytest.raises(ValueError, match="NaN"),
        SliceWriter(tmp_path, 0, "abc-1", Background(2), nothing) as writer,
    ):
        writer.add("layer", 0, layers()["large"])
        raise ValueError("NaN")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_write_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_writer, "FILE_BYTES", 64)
    taken = tmp_path / "rank-0-part-1.abc-1.safetensors"
    taken.write_bytes(b"another's")
    with (
        pytest.raises(FileExistsError),
        SliceWriter(tmp_path, 0, "abc-1", Background(2), nothing) as writer,
    ):
        writer.add("layer", 0, layers()["large"])
        writer.finish()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"another's"]


def test_no_file_is_begun_against_the_guard(tmp_path: Path) -> None:
    def displaced() -> None:
        raise RuntimeError("another owner")

    with (
        pytest.raises(RuntimeError, match="another owner"),
        SliceWriter(tmp_path, 0, "abc-1", Background(), displaced) as writer,
    ):
        writer.add("layer", 0, layers()["small"])
        writer.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("threads", [1, 2, 9])
def test_of_damaged_files_the_first_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr(slice_writer, "FILE_BYTES", 64)
    record = record_of(written(tmp_path))
    assert len(record.files) > 9
    for number in (4, 7):
        path = tmp_path / record.files[number].name
        path.write_bytes(path.read_bytes()[:-1] + b"\7")
    with pytest.raises(CorruptFileError, match=record.files[4].name):
        verify_record(tmp_path, record, threads)
    (tmp_path / record.files[1].name).unlink()
    with pytest.raises(CorruptFileError, match=record.files[1].name):
        verify_record(tmp_path, record, threads)


# -- whole jobs ----------------------------------------------------------------------------------


def test_a_job_of_many_files_is_resumed_with_the_same_bytes(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, options = tiny_model("llama", blocks=3), {"method": "wanda", "workers": 2, "threads": 2}
    whole = prune_here(model, tmp_path / "whole", **options)
    monkeypatch.setattr(slice_writer, "FILE_BYTES", 2000)
    with pytest.raises(Interrupted):
        prune_here(model, tmp_path / "out", executor=StopsAt(2, "advance", 1), **options)
    run = RunDirectory(tmp_path / "out.run")
    record = read_record(run.record(0))
    assert len(record.files) > 4
    by_layer = itertools.chain(*(layer.slices for layer in record.layers.values()))
    assert {part.file for part in by_layer} == {file.name for file in record.files}
    # A damaged one of the parts: the block is solved again.
    part = next(file.name for file in record.files if "-part-" in file.name)
    path = run.checkpoints(0) / part
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    prune_here(model, tmp_path / "out", **options)
    one, other = (
        {name: data for name, data in contents(folder).items() if name.endswith("safetensors")}
        for folder in (whole.output, tmp_path / "out")
    )
    assert one
    assert one == other
