"""Reads a model that is stored in few bits as a bfloat16 model.

`DequantizedFolder` is a model folder with a config.json, an index and safetensors files, but its
weight files are not on any disk. Their headers are derived from the stored ones, and a tensor's
bytes are computed when they are read, some rows at a time. Code that reads, hashes, plans or copies
a model therefore works unchanged. The caller passes the functions that dequantize.
"""

from __future__ import annotations

import bisect
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from storage.errors import ModelError
from storage.files.os_errors import explained
from storage.model.files import INDEX_FILE, ModelFiles, stream_state
from storage.model.folder import MAX_STAGED_BYTES, SIDE_FOLDERS, Staging, inside, is_small
from storage.model.safetensors_format import (
    TensorEntry,
    header_for,
    safetensors_dtype,
    tensor_bytes,
    torch_dtype,
)
from storage.object_store import Place, Readable

DTYPE = torch.bfloat16
"""The dtype of all dequantized tensors."""

MADE_BYTES = 2**21
"""Bytes of bfloat16 that are dequantized at a time. The float32 intermediates are several times as
large; so small, they stay in a core's cache, which halves the time."""


@dataclass(frozen=True)
class Dequantized:
    """A tensor of the bfloat16 model that is computed from several stored tensors.

    name, shape: of the result. stored: names of the stored tensors, the values first; the bfloat16
    model does not have these. decode(start, stop): rows start:stop of the result, DTYPE, on the
    CPU. start is a multiple of `step`; stop is one too, or the number of rows.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[str, ...]
    decode: Callable[[int, int], torch.Tensor]
    step: int = 1

    def rows_at_a_time(self) -> int:
        """As many rows as fit in MADE_BYTES, in whole steps; one step at least."""
        row_bytes = math.prod(self.shape[1:]) * DTYPE.itemsize
        return max(MADE_BYTES // max(row_bytes, 1) // self.step, 1) * self.step


class DequantizedFolder:
    """The bfloat16 model that the files `stored` are dequantized to, as a `ModelFolder`.

    tensors: those that are computed. dropped: other stored tensors to leave out, such as scales of
    activations. config: the new config.json. kind: name of the stored format, for people.

    folder: a temporary folder of this process, with config.json, a new index and the small files.
    contradictions: those of the stored files (see `ModelFiles`), by the new names of the tensors.
    Raises `ModelError` for small files of more than MAX_STAGED_BYTES, `ResourceError` where the
    disk is full.
    """

    def __init__(
        self,
        stored: ModelFiles,
        tensors: Iterable[Dequantized],
        dropped: Collection[str],
        config: Mapping[str, Any],
        kind: str,
    ) -> None:
        self.place: Place = stored.place
        self.stored_as = kind
        self.made_from = stored.identity()
        self._stored = stored
        self._made = {tensor.name: tensor for tensor in tensors}
        self._layouts = _layouts(stored, self._made, dropped)
        self.contradictions = _contradictions(stored, self._made)
        self._staging = Staging()
        self.folder = self._staging.path / (stored.folder.name or "model")
        self._fill(config)

    def _fill(self, config: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True)
        old = self._stored.folder
        names = [name for name in _small_files(old) if name not in ("config.json", INDEX_FILE)]
        if sum((old / name).stat().st_size for name in names) > MAX_STAGED_BYTES:
            raise ModelError(
                f"{self.place}: files that are not weights take more than "
                f"{MAX_STAGED_BYTES >> 20} MiB; move what is not of the model elsewhere"
            )
        texts = {"config.json": json.dumps(config, indent=2) + "\n"}
        if self._stored.index is not None:
            texts[INDEX_FILE] = self._index()
        with explained(self.folder):
            for name in names:
                (self.folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(inside(old, name), self.folder / name)
            for name, text in texts.items():
                (self.folder / name).write_text(text, encoding="utf-8")

    def _index(self) -> str:
        entries = [entry for layout in self._layouts.values() for entry in layout.entries]
        index = {
            "metadata": {"total_size": sum(entry.end - entry.start for entry in entries)},
            "weight_map": {entry.name: entry.file for entry in entries},
        }
        return json.dumps(index, indent=2) + "\n"

    def exists(self, file: str) -> bool:
        """Whether there is a weight file, or another file, of that name."""
        return file in self._layouts or (self.folder / file).exists()

    def require(self, file: str) -> None:
        """Raise as `inside` does, unless `file` is a weight file."""
        if file not in self._layouts:
            inside(self.folder, file)

    def open(self, file: str, *, ahead: bool = False) -> Readable:
        """A weight file, computed as it is read. `ModelError` if there is none of that name."""
        if file not in self._layouts:
            raise ModelError(f"{self.where(file)}: missing; download the model again")
        return DequantizedFile(self._stored, file, self._layouts[file], self._made)

    def size(self, file: str) -> int:
        """Bytes of a file of the bfloat16 model."""
        layout = self._layouts.get(file)
        return inside(self.folder, file).stat().st_size if layout is None else layout.size

    def where(self, file: str) -> str:
        """The path of the stored file."""
        return self._stored.source.where(file)


@dataclass(frozen=True)
class _Layout:
    """The header of a computed weight file, and its tensors in order, with their offsets.

    values: the tensors that are not empty; starts: their first bytes. files: the stored weight
    files that it is computed from.
    """

    header: bytes
    entries: tuple[TensorEntry, ...]
    values: tuple[TensorEntry, ...]
    starts: tuple[int, ...]
    files: tuple[str, ...]

    @property
    def size(self) -> int:
        return self.entries[-1].end


def _contradictions(stored: ModelFiles, made: Mapping[str, Dequantized]) -> dict[str, str]:
    owners = {part: tensor.name for tensor in made.values() for part in tensor.stored}
    return {owners.get(name, name): text for name, text in stored.contradictions.items()}


def _layouts(
    stored: ModelFiles, made: Mapping[str, Dequantized], dropped: Collection[str]
) -> dict[str, _Layout]:
    """Weight file -> its layout. A tensor is in the file that has its values; files with nothing
    but scales are left out."""
    of = {tensor.stored[0]: tensor for tensor in made.values()}
    gone = {name for tensor in made.values() for name in tensor.stored} | set(dropped)
    files: dict[str, list[TensorEntry]] = {}
    for entry in sorted(stored.tensors.values(), key=lambda entry: entry.start):
        if entry.name in of:
            tensor = of[entry.name]
            dtype = safetensors_dtype(DTYPE)
            entry = replace(entry, name=tensor.name, shape=tensor.shape, dtype=dtype)
        elif entry.name in gone:
            continue
        files.setdefault(entry.file, []).append(entry)
    found = {}
    for file in sorted(files):
        parts = [name for e in files[file] if e.name in made for name in made[e.name].stored]
        sources = {file, *(stored.tensors[name].file for name in parts)}
        found[file] = _layout(files[file], tuple(sorted(sources)))
    return found


def _layout(entries: list[TensorEntry], files: tuple[str, ...]) -> _Layout:
    # Wide dtypes first, as safetensors' own writer has them: every value stays aligned.
    entries = sorted(entries, key=lambda entry: -torch_dtype(entry.dtype).itemsize)
    shapes = {
        entry.name: torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device="meta")
        for entry in entries
    }
    header, found = header_for(shapes, {"format": "pt"}), []
    at = len(header)
    for entry in entries:
        end = at + math.prod(entry.shape) * torch_dtype(entry.dtype).itemsize
        found.append(replace(entry, start=at, end=end))
        at = end
    values = tuple(entry for entry in found if entry.end > entry.start)
    return _Layout(header, tuple(found), values, tuple(entry.start for entry in values), files)


class DequantizedFile:
    """A weight file of the bfloat16 model, read like an unbuffered file.

    size: in bytes. It keeps the rows that were dequantized last, and no others.
    """

    def __init__(
        self, stored: ModelFiles, file: str, layout: _Layout, made: Mapping[str, Dequantized]
    ) -> None:
        self.size = layout.size
        self._stored, self._file, self._layout, self._made = stored, file, layout, made
        self._position = 0
        self._rows: tuple[str, int] | None = None
        self._bytes = memoryview(b"")
        self._plain: Readable | None = None

    @property
    def state(self) -> tuple[object, ...]:
        """A value that changes when a stored file is written to or replaced."""
        states: list[object] = []
        for file in self._layout.files:
            with self._stored.source.open(file) as stream:
                states.append(stream_state(stream))
        return tuple(states)

    def seek(self, position: int) -> int:
        """Where the next read begins, in bytes from the start."""
        self._position = position
        return position

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def read(self, count: int) -> bytes:
        """The next bytes, `count` unless the file ends."""
        raw = bytearray(max(0, min(count, self.size - self._position)))
        done = self.readinto(memoryview(raw))
        return bytes(raw[:done])

    def readinto(self, view: memoryview) -> int:
        """Fill `view`, unless the file ends; returns how many bytes were read.

        Raises `CorruptFileError` where a stored file is shorter than it was.
        """
        done, stop = 0, min(len(view), self.size - self._position)
        while done < stop:
            count = self._next(view[done:stop])
            if not count:
                break
            done += count
            self._position += count
        return done

    def _next(self, view: memoryview) -> int:
        """Some bytes at the position, one at least if there are any."""
        at = self._position
        if at < len(self._layout.header):
            part = memoryview(self._layout.header)[at : at + len(view)]
            view[: len(part)] = part
            return len(part)
        entry = self._layout.values[bisect.bisect_right(self._layout.starts, at) - 1]
        view = view[: entry.end - at]
        if entry.name not in self._made:
            return self._copied(entry, at - entry.start, view)
        part = self._decoded(self._made[entry.name], entry, at - entry.start)[: len(view)]
        view[: len(part)] = part
        return len(part)

    def _copied(self, entry: TensorEntry, offset: int, view: memoryview) -> int:
        if self._plain is None:
            self._plain = self._stored.source.open(self._file)
        self._plain.seek(self._stored.tensors[entry.name].start + offset)
        return self._plain.readinto(view) or 0

    def _decoded(self, tensor: Dequantized, entry: TensorEntry, offset: int) -> memoryview:
        """The bytes of a tensor from `offset` on, as far as its rows are decoded together."""
        row_bytes = (entry.end - entry.start) // tensor.shape[0]
        step = tensor.rows_at_a_time()
        start = offset // row_bytes // step * step
        if self._rows != (tensor.name, start):
            stop = min(start + step, tensor.shape[0])
            # What was decoded before goes first.
            self._rows, self._bytes = None, memoryview(b"")
            rows = tensor.decode(start, stop)
            if rows.dtype != DTYPE or tuple(rows.shape) != (stop - start, *tensor.shape[1:]):
                raise ModelError(
                    f"{self._stored.source.where(self._file)}: {tensor.name} was dequantized to "
                    f"{rows.dtype} {list(rows.shape)} in place of {list(tensor.shape)}; look at "
                    "the version of the library that did it"
                )
            self._rows, self._bytes = (tensor.name, start), tensor_bytes(rows)
        return self._bytes[offset - start * row_bytes :]

    def close(self) -> None:
        """Close the stored file, and free the rows."""
        self._rows, self._bytes = None, memoryview(b"")
        if self._plain is not None:
            self._plain.close()
            self._plain = None

    def __enter__(self) -> DequantizedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _small_files(folder: Path) -> Iterator[str]:
    """The files of a model folder that are not weights, those of other folders left out."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and is_small(path.name):
            yield path.name
    for side in SIDE_FOLDERS:
        if (folder / side).is_dir():
            for path in sorted((folder / side).iterdir()):
                if path.is_file() and is_small(f"{side}/{path.name}"):
                    yield f"{side}/{path.name}"
