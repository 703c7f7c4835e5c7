"""Block checkpoints: the row slices that the ranks solved, and the record that commits them.

A row slice is a range of consecutive rows of one layer's pruned weight. Each rank writes its slices
of a block to safetensors files, one or more per pass; the driver publishes a `BlockRecord` that
names the files with their hashes, and the file of every row slice. The record's existence is the
commit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from storage.errors import CorruptFileError
from storage.files.checked_json import is_count
from storage.files.commit import read_json, verify_file, verify_files, write_new_file
from storage.files.hashing import StoredFile, is_plain_name
from storage.files.os_errors import is_damage
from storage.model.safetensors_format import (
    header_for,
    read_header,
    read_into,
    safetensors_dtype,
    tensor_bytes,
    torch_dtype,
)
from storage.run.directory import BLOCK_SCHEMA


class RowSlice(NamedTuple):
    """Rows start : start + len(tensor) of a layer. tensor: (rows, C), in the stored dtype."""

    start: int
    tensor: torch.Tensor


class LayerSlice(NamedTuple):
    """Rows start:stop of a layer are in `file`, under the layer's name."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class LayerRecord:
    """One pruned layer. shape: (R, C). dtype: safetensors name. results: the solver's report."""

    shape: tuple[int, int]
    dtype: str
    slices: tuple[LayerSlice, ...]
    results: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The dictionary that `from_json` reads."""
        return {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "slices": [list(part) for part in self.slices],
            "results": self.results,
        }

    @staticmethod
    def from_json(data: object, source: str) -> LayerRecord:
        """Raises CorruptFileError, naming `source`, for anything `to_json` does not write."""
        record = _object(data, source)
        shape, slices = record.get("shape"), record.get("slices")
        if not isinstance(slices, list) or not isinstance(record.get("dtype"), str):
            raise _malformed(source)
        if not isinstance(shape, list) or len(shape) != 2 or not all(map(is_count, shape)):
            raise _malformed(source)
        for part in slices:
            if not isinstance(part, list) or len(part) != 3:
                raise _malformed(source)
            if not (is_plain_name(part[0]) and is_count(part[1]) and is_count(part[2])):
                raise _malformed(source)
        return LayerRecord(
            shape=(shape[0], shape[1]),
            dtype=cast(str, record["dtype"]),
            slices=tuple(LayerSlice(*part) for part in slices),
            results=_object(record.get("results"), source),
        )


@dataclass(frozen=True, kw_only=True)
class BlockRecord:
    """The record that commits a block.

    attempt: number of the attempt that made it. world: number of ranks. files: all files that the
    record needs, in the block's checkpoint directory. layers: path in the block → record. norms:
    path of a norm's weight or bias that was trained → record; a vector (n,) is (n, 1). results:
    facts of the block as a whole (times, groups, choices), any JSON.
    """

    block: int
    attempt: int
    world: int
    files: tuple[StoredFile, ...]
    layers: dict[str, LayerRecord]
    norms: dict[str, LayerRecord] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    schema_version: int = BLOCK_SCHEMA

    def to_json(self) -> dict[str, Any]:
        """The payload for `publish_json`."""
        return {
            "schema_version": self.schema_version,
            "block": self.block,
            "attempt": self.attempt,
            "world": self.world,
            "files": [file.to_json() for file in self.files],
            "layers": {name: layer.to_json() for name, layer in self.layers.items()},
            "norms": {name: norm.to_json() for name, norm in self.norms.items()},
            "results": self.results,
        }

    @staticmethod
    def from_json(data: object, source: str = "block record") -> BlockRecord:
        """Raises CorruptFileError, naming `source`, for anything `to_json` does not write."""
        record = _object(data, source)
        files = record.get("files")
        numbers = [record.get(key) for key in ("schema_version", "block", "attempt", "world")]
        if not isinstance(files, list) or not all(map(is_count, numbers)):
            raise _malformed(source)
        layers, norms = (_object(record.get(key), source) for key in ("layers", "norms"))
        return BlockRecord(
            block=record["block"],
            attempt=record["attempt"],
            world=record["world"],
            files=tuple(StoredFile.from_json(file, source) for file in files),
            layers={name: LayerRecord.from_json(item, source) for name, item in layers.items()},
            norms={name: LayerRecord.from_json(item, source) for name, item in norms.items()},
            results=_object(record.get("results"), source),
            schema_version=record["schema_version"],
        )


def read_block_record(path: Path) -> BlockRecord:
    """The committed record at `path`; errors as in `read_json`."""
    return BlockRecord.from_json(read_json(path, BLOCK_SCHEMA), str(path))


def write_row_slices(path: Path, slices: Mapping[str, RowSlice]) -> StoredFile:
    """Write row slices of a block, all of one rank, to the new safetensors file `path`, durably.

    slices: layer → its rows. The file's metadata have each layer's rows as "start:stop". Raises
    ValueError for no slices, FileExistsError if `path` exists, ResourceError if the disk is full.
    """
    if not slices:
        raise ValueError(f"{path}: no row slices to write")
    metadata = {
        name: f"{part.start}:{part.start + part.tensor.shape[0]}" for name, part in slices.items()
    }
    tensors = {name: part.tensor for name, part in slices.items()}
    with write_new_file(path) as writer:
        writer.write(header_for(tensors, metadata))
        for tensor in tensors.values():
            writer.write(tensor_bytes(tensor))
    return writer.stored(path.name, sum(tensor.shape[0] for tensor in tensors.values()))


def read_layer(
    directory: Path, record: BlockRecord | Mapping[str, Any], layer: str, *, verify: bool = True
) -> torch.Tensor:
    """The whole pruned weight (R, C) of a layer, or a norm, in its stored dtype on the CPU.

    directory: of the record's files. verify: compare the hash of each file that is read; False if
    `verify_record` has done so. Raises CorruptFileError, naming the file, if one is missing or
    altered, or if the slices do not cover the layer's rows exactly once.
    """
    if not isinstance(record, BlockRecord):
        record = BlockRecord.from_json(record, str(directory))
    item = record.layers.get(layer) or record.norms.get(layer)
    if item is None:
        raise CorruptFileError(f"{directory}: the record of block {record.block} lacks {layer}")
    hashes = {file.name: file.sha256 for file in record.files}
    slices = sorted((p for p in item.slices if p.stop != p.start), key=lambda part: part.start)
    covered = 0
    for part in slices:
        if part.start != covered or part.stop <= part.start or part.file not in hashes:
            break
        covered = part.stop
    if covered != item.shape[0] or (slices and slices[-1].stop != covered):
        raise CorruptFileError(
            f"{directory}: the row slices of block {record.block}, {layer}, do not cover its "
            f"{item.shape[0]} rows"
        )
    dtype = torch_dtype(item.dtype)
    # Checked before memory is allocated for the shape, which may be wrong.
    if math.prod(item.shape) * dtype.itemsize > _sizes(directory, {part.file for part in slices}):
        raise CorruptFileError(
            f"{directory}: the row slices of block {record.block}, {layer}, are too short or gone; "
            "delete the record to redo the block"
        )
    weight = torch.empty(item.shape, dtype=dtype)
    for part in slices:
        path = directory / part.file
        if verify:
            verify_file(path, hashes[part.file])
        _read_slice(path, layer, weight[part.start : part.stop])
    return weight


def _sizes(directory: Path, names: Iterable[str]) -> int:
    try:
        return sum((directory / name).stat().st_size for name in names)
    except OSError as error:
        if not is_damage(error):
            raise
        raise CorruptFileError(f"{error.filename}: {error.strerror}; redo the block") from error


def verify_record(directory: Path, record: BlockRecord, threads: int = 1) -> None:
    """Hash every file of the record; CorruptFileError for the first that does not match.

    threads: how many files are hashed at a time.
    """
    verify_files(directory, record.files, threads)


def _read_slice(path: Path, layer: str, rows: torch.Tensor) -> None:
    """Fill the contiguous tensor `rows` (n, C) from the tensor `layer` of a row slice file."""
    try:
        entries = {entry.name: entry for entry in read_header(path, path.name)}
        entry = entries.get(layer)
        if entry is None or entry.shape != tuple(rows.shape):
            raise CorruptFileError(f"{path}: no {tuple(rows.shape)} of {layer}")
        if entry.dtype != safetensors_dtype(rows.dtype):
            raise CorruptFileError(f"{path}: {layer} is {entry.dtype}, not as recorded")
        with open(path, "rb", buffering=0) as file:
            file.seek(entry.start)
            read_into(file, rows.view(-1).view(torch.uint8), f"{path}: {layer}")
    except OSError as error:
        if not is_damage(error):
            raise
        raise CorruptFileError(f"{path}: cannot be read ({error.strerror})") from error


def _object(data: object, source: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise _malformed(source)
    return data


def _malformed(source: str) -> CorruptFileError:
    return CorruptFileError(f"{source}: not a block record")
