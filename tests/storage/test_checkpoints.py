"""Row slices and block records: a layer is put together whole, or the damage is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from storage.errors import CorruptFileError, RunDirectoryError
from storage.files.commit import publish_json, sha256_file
from storage.run.checkpoints import (
    BLOCK_SCHEMA,
    BlockRecord,
    LayerRecord,
    LayerSlice,
    RowSlice,
    read_block_record,
    read_layer,
    verify_record,
    write_row_slices,
)

Q, UP = "self_attn.q_proj", "mlp.up_proj"


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        Q: torch.randn(10, 8, generator=generator).bfloat16(),
        UP: torch.randn(7, 12, generator=generator),
    }


def solve_on(directory: Path, ranges: dict[str, list[tuple[int, int]]]) -> BlockRecord:
    """What the ranks and the driver write when rank r has ranges[layer][r] of each layer."""
    world = max(len(parts) for parts in ranges.values())
    files = []
    for rank in range(world):
        mine = {
            layer: RowSlice(parts[rank][0], weights()[layer][slice(*parts[rank])])
            for layer, parts in ranges.items()
        }
        files.append(write_row_slices(directory / f"rank-{rank}.x-1.safetensors", mine))
    layers = {
        layer: LayerRecord(
            shape=(weights()[layer].shape[0], weights()[layer].shape[1]),
            dtype="BF16" if layer == Q else "F32",
            slices=tuple(LayerSlice(files[r].name, *part) for r, part in enumerate(parts)),
            results={"relative_error": 1.25},
        )
        for layer, parts in ranges.items()
    }
    return BlockRecord(
        block=3, attempt=2, world=world, files=tuple(files), layers=layers, results={"seconds": 0.5}
    )


@pytest.fixture
def record(tmp_path: Path) -> BlockRecord:
    return solve_on(tmp_path, {Q: [(0, 4), (4, 8), (8, 10)], UP: [(0, 3), (3, 3), (3, 7)]})


def test_a_layer_is_put_together_from_the_slices(tmp_path: Path, record: BlockRecord) -> None:
    for layer, weight in weights().items():
        found = read_layer(tmp_path, record, layer)
        assert found.dtype == weight.dtype
        assert torch.equal(found, weight)
        assert torch.equal(read_layer(tmp_path, record.to_json(), layer, verify=False), weight)
    verify_record(tmp_path, record)


def test_a_record_comes_back_through_its_file(tmp_path: Path, record: BlockRecord) -> None:
    path = tmp_path / "record.json"
    publish_json(path, record.to_json())
    assert read_block_record(path) == record
    assert json.loads(path.read_text())["schema_version"] == BLOCK_SCHEMA


def test_the_slices_are_plain_safetensors(tmp_path: Path, record: BlockRecord) -> None:
    path = tmp_path / record.files[1].name
    loaded = load_file(path)
    assert torch.equal(loaded[Q], weights()[Q][4:8])
    assert loaded[UP].shape == (0, 12)
    with safe_open(path, "pt") as reader:
        assert reader.metadata() == {Q: "4:8", UP: "3:3"}
    assert record.files[1].rows == 4
    assert record.files[1].sha256 == sha256_file(path)


def test_the_bytes_depend_on_the_slices_alone(tmp_path: Path) -> None:
    # The safetensors library orders the metadata anew in every process; ours keep their order.
    names = [f"layer{number}" for number in (7, 3, 11, 0, 9)]
    slices = {name: RowSlice(2, torch.arange(12.0).view(3, 4)) for name in names}
    path = tmp_path / "a.safetensors"
    write_row_slices(path, slices)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert list(header) == ["__metadata__", *names]
    assert list(header["__metadata__"]) == names


def test_a_slice_of_a_larger_tensor_is_written_alone(tmp_path: Path) -> None:
    whole = torch.randn(100, 50)
    stored = write_row_slices(tmp_path / "a.safetensors", {Q: RowSlice(5, whole[5:7, ::2])})
    assert stored.bytes < 1000
    assert torch.equal(load_file(tmp_path / "a.safetensors")[Q], whole[5:7, ::2])


def test_nothing_to_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row slices"):
        write_row_slices(tmp_path / "a.safetensors", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "delete"])
def test_a_damaged_slice_file_is_named(tmp_path: Path, record: BlockRecord, damage: str) -> None:
    path = tmp_path / record.files[2].name
    raw = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        flipped = raw[:-1] + bytes([raw[-1] ^ 1])
        path.write_bytes({"flip": flipped, "cut": raw[:-1], "empty": b""}[damage])
    with pytest.raises(CorruptFileError, match=path.name):
        read_layer(tmp_path, record, UP)
    with pytest.raises(CorruptFileError, match=path.name):
        verify_record(tmp_path, record)
    if damage != "flip":
        with pytest.raises(CorruptFileError, match=path.name):
            read_layer(tmp_path, record, UP, verify=False)


def with_slices(record: BlockRecord, layer: str, slices: list[LayerSlice]) -> BlockRecord:
    changed = dataclasses.replace(record.layers[layer], slices=tuple(slices))
    return dataclasses.replace(record, layers={**record.layers, layer: changed})


def test_rows_missing_or_told_twice_are_refused(tmp_path: Path, record: BlockRecord) -> None:
    one, two, three = record.layers[Q].slices
    wrong = [
        [],
        [one, two],
        [two, three],
        [one, three],
        [one, two, two, three],
        [one, two, LayerSlice(three.file, 7, 10)],
        [one, two, LayerSlice(three.file, 8, 11)],
        [one, two, three, LayerSlice(three.file, 10, 12)],
        [one, two, LayerSlice("a-file-the-record-does-not-list", 8, 10)],
    ]
    for slices in wrong:
        with pytest.raises(CorruptFileError, match="do not cover its 10 rows"):
            read_layer(tmp_path, with_slices(record, Q, slices), Q)
    in_another_order = with_slices(record, Q, [three, one, two])
    assert torch.equal(read_layer(tmp_path, in_another_order, Q), weights()[Q])


def test_a_slice_of_another_shape_or_dtype_is_refused(tmp_path: Path, record: BlockRecord) -> None:
    one, two, three = record.layers[Q].slices
    shorter = [LayerSlice(one.file, 0, 3), LayerSlice(two.file, 3, 8), three]
    with pytest.raises(CorruptFileError, match=one.file):
        read_layer(tmp_path, with_slices(record, Q, shorter), Q)
    changed = dataclasses.replace(record.layers[Q], dtype="F16")
    with pytest.raises(CorruptFileError, match="not as recorded"):
        read_layer(tmp_path, dataclasses.replace(record, layers={Q: changed}), Q)
    with pytest.raises(CorruptFileError, match="lacks nothing"):
        read_layer(tmp_path, record, "nothing")


def broken(path: list[str | int], value: Any) -> Any:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        broken(["block"], "3"),
        broken(["attempt"], -1),
        broken(["world"], None),
        broken(["files"], {}),
        broken(["files", 0, "name"], "../../x"),
        broken(["files", 0, "sha256"], "beef"),
        broken(["files", 0, "bytes"], 1.5),
        broken(["layers"], []),
        broken(["layers", Q], 1),
        broken(["layers", Q, "shape"], [1]),
        broken(["layers", Q, "dtype"], 16),
        broken(["layers", Q, "slices", 0], ["/etc/passwd", 0, 4]),
        broken(["layers", Q, "slices", 0], ["a", 0]),
        broken(["layers", Q, "slices", 0], ["a", 0, True]),
        broken(["results"], "fine"),
    ],
)
def test_a_malformed_record_is_named(record: BlockRecord, change: Any) -> None:
    data = json.loads(json.dumps(record.to_json()))
    assert BlockRecord.from_json(data, "block-003/record.json") == record
    change(data)
    with pytest.raises(CorruptFileError, match=r"block-003/record\.json"):
        BlockRecord.from_json(data, "block-003/record.json")


def test_a_record_of_another_version_is_refused(tmp_path: Path, record: BlockRecord) -> None:
    path = tmp_path / "record.json"
    publish_json(path, record.to_json() | {"schema_version": BLOCK_SCHEMA + 1})
    with pytest.raises(RunDirectoryError, match=r"record\.json"):
        read_block_record(path)
