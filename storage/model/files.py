"""The source model, on a disk or in an object store: its safetensors files, read tensor by tensor.

`ModelFiles.open` reads and checks the headers only; `read` loads one tensor, or some of its rows.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from storage.errors import CorruptFileError, ModelError
from storage.files.commit import CHUNK_BYTES
from storage.model.adapter import refuse_adapter_alone
from storage.model.folder import LocalFolder, ModelFolder, inside, model_folder
from storage.model.index_file import (
    INDEX_FILE,
    SINGLE_FILE,
    index_contradictions,
    read_object,
    weight_map,
)
from storage.model.other_formats import (
    quantization,
    refuse_other_formats,
    refuse_packed,
    refuse_quantized,
)
from storage.model.safetensors_format import (
    TensorEntry,
    header_entries,
    raw_header,
    read_into,
    safetensors_dtype,
    torch_dtype,
)
from storage.object_store import Place, Readable

__all__ = [
    "INDEX_FILE",
    "ModelFiles",
    "TensorEntry",
    "WeightFileFingerprint",
    "fingerprint_weight_file",
    "inside",
    "safetensors_dtype",
    "torch_dtype",
]


class Digest(Protocol):
    """A hash object of hashlib."""

    def update(self, data: Any, /) -> None:
        """Hashes more bytes."""
        ...

    def hexdigest(self) -> str:
        """The hash of all bytes so far."""
        ...


@dataclass(frozen=True)
class WeightFileFingerprint:
    """The hashes of one weight file.

    sha256: of the whole file. tensors: name → sha256 of the tensor's bytes.
    """

    file: str
    bytes: int
    sha256: str
    tensors: dict[str, str]


class ModelFiles:
    """A model folder whose headers have been read and are consistent.

    source: its folder. files: names of its weight files, sorted. tensors: name → entry. config:
    the contents of config.json. index: name of the index file; None for a single weight file.
    expected: tensor → sha256 that its bytes must have when they are read; empty until the model has
    been hashed. Of a tensor whose name is in two files, see `key`.
    """

    def __init__(
        self,
        source: ModelFolder,
        files: tuple[str, ...],
        tensors: dict[str, TensorEntry],
        config: dict[str, Any],
        index: str | None,
        contradictions: Mapping[str, str] | None = None,
        repeated: Sequence[TensorEntry] = (),
    ) -> None:
        """contradictions: tensor → how index and weight files disagree on it. repeated: tensors
        whose name is also in an earlier file."""
        self.source = source
        self.files = files
        self.tensors = tensors
        self.config = config
        self.index = index
        self.contradictions = dict(contradictions or {})
        self.repeated = tuple(repeated)
        self.expected: Mapping[str, str] = {}
        # Tensor → state of its file when the tensor was last compared with `expected`.
        self._seen: dict[str, tuple[object, ...]] = {}

    @staticmethod
    def open(place: Place) -> ModelFiles:
        """`read_headers`, where index and weight files must agree on every tensor."""
        files = ModelFiles.read_headers(place)
        files.require_consistent()
        return files

    @staticmethod
    def read_headers(
        place: Place, dequantized: Callable[[ModelFiles], ModelFolder] | None = None
    ) -> ModelFiles:
        """Read config, index and headers of the model at `place`.

        dequantized: gives the bfloat16 folder of a model that is stored in few bits; without it
        such a model is refused.

        What index and weight files do not agree on is noted only, since no one may load it: see
        `require_consistent`. Raises ModelError if something is missing or of an unsupported kind,
        CorruptFileError if something is there but malformed or truncated. Weights are not read.
        """
        source = model_folder(place)
        if not (source.folder / "config.json").is_file():
            refuse_adapter_alone(source.folder, place)
            refuse_other_formats(source.folder, place)
            raise ModelError(f"{place}: no config.json; give a Hugging Face model folder")
        config = read_object(inside(source.folder, "config.json"))
        refuse_quantized(config, source.where("config.json"), readable=dequantized is not None)
        files = ModelFiles._with_headers(source, config)
        if dequantized is None or quantization(config) is None:
            return files
        source = dequantized(files)
        return ModelFiles._with_headers(source, read_object(inside(source.folder, "config.json")))

    @staticmethod
    def _with_headers(source: ModelFolder, config: dict[str, Any]) -> ModelFiles:
        place = source.place
        listed = weight_map(source)
        names = (SINGLE_FILE,) if listed is None else tuple(sorted(set(listed.values())))
        tensors: dict[str, TensorEntry] = {}
        repeated = []
        contradictions = {}
        for entry in (entry for file in names for entry in _header(source, file)):
            if entry.name in tensors:
                repeated.append(entry)
                contradictions[entry.name] = (
                    f"tensor {entry.name} is in {tensors[entry.name].file} and in {entry.file}"
                )
            else:
                tensors[entry.name] = entry
        if not tensors:
            raise ModelError(f"{place}: the weight files hold no tensors")
        refuse_packed(tensors, source.folder, place)
        if listed is not None:
            contradictions = index_contradictions(listed, tensors) | contradictions
        index = None if listed is None else INDEX_FILE
        return ModelFiles(source, names, tensors, config, index, contradictions, repeated)

    def require_consistent(self, names: Collection[str] | None = None) -> None:
        """Raise CorruptFileError where index and weight files disagree on one of the tensors.

        names: those that are loaded; None for all.
        """
        for name, contradiction in self.contradictions.items():
            if names is None or name in names:
                raise CorruptFileError(f"{self.place}: {contradiction}; download the model again")

    @property
    def folder(self) -> Path:
        """A local folder with all files, except the weights of a model in an object store."""
        return self.source.folder

    @property
    def place(self) -> Place:
        """The model's folder as the user named it: a path or an object store's."""
        return self.source.place

    def size(self, file: str) -> int:
        """Bytes of a file."""
        return self.source.size(file)

    def entry(self, name: str) -> TensorEntry:
        """The entry of tensor `name`; ModelError if the model has no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelError(
                f"{self.place}: no tensor {name}; the weight files do not fit config.json"
            ) from None

    def entries(self, file: str) -> list[TensorEntry]:
        """All tensors of a weight file in the order of their bytes, repeated ones too."""
        own = [e for e in (*self.tensors.values(), *self.repeated) if e.file == file]
        return sorted(own, key=lambda entry: (entry.start, entry.end))

    def key(self, entry: TensorEntry) -> str:
        """What `expected` calls a tensor: its name, and its file if an earlier one has it too."""
        if self.tensors.get(entry.name) == entry:
            return entry.name
        return f"{entry.name} in {entry.file}"

    def hashes(self, fingerprints: Iterable[WeightFileFingerprint]) -> dict[str, str]:
        """What is `expected` of every tensor, by the fingerprints of all weight files."""
        by_file = {fingerprint.file: fingerprint.tensors for fingerprint in fingerprints}
        return {
            self.key(entry): by_file[entry.file][entry.name]
            for entry in (*self.tensors.values(), *self.repeated)
        }

    def state(self, name: str) -> tuple[object, ...]:
        """What changes when someone writes to the file that tensor `name` is in."""
        with self.source.open(self.entry(name).file) as file:
            return stream_state(file)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A copy of tensor `name` on the CPU, in its stored dtype.

        rows: (start, stop) of the first dimension; None for the whole tensor. Only these are read,
        unless the tensor's hash is known and the file has changed since the last comparison: then
        the whole tensor is read and compared. Raises ModelError for an unknown name or dtype,
        CorruptFileError if the file is too short or the tensor is not the `expected` one,
        IndexError for rows out of range.
        """
        entry = self.entry(name)
        shape, start, end = entry.shape, entry.start, entry.end
        if rows is not None:
            if not shape or not 0 <= rows[0] <= rows[1] <= shape[0]:
                raise IndexError(f"{name} has shape {shape}: no rows {rows[0]}:{rows[1]}")
            row_bytes = (end - start) // shape[0] if shape[0] else 0
            shape = (rows[1] - rows[0], *shape[1:])
            start, end = start + rows[0] * row_bytes, start + rows[1] * row_bytes
        with self.source.open(entry.file) as file:
            state = stream_state(file)
            # A whole tensor is always compared. Rows, which the solve reads, are those that the
            # calibration has compared, unless the file has changed since.
            compared = name in self.expected and (rows is None or self._seen.get(name) != state)
            raw = self._bytes(file, entry, start, end, compared)
        if compared:
            self._seen[name] = state
        return raw.view(torch_dtype(entry.dtype)).reshape(shape)

    def _bytes(
        self, file: Readable, entry: TensorEntry, start: int, end: int, compared: bool
    ) -> torch.Tensor:
        """Bytes start:end of a file, (n,) uint8. compared: hash the whole tensor first.

        Bytes that are only hashed are in memory CHUNK_BYTES at a time.
        """
        what = f"{self.source.where(entry.file)}: tensor {entry.name}"
        raw = torch.empty(end - start, dtype=torch.uint8)
        if not compared:
            file.seek(start)
            read_into(file, raw, what)
            return raw
        digest = hashlib.sha256()
        file.seek(entry.start)
        for at, to in (*_chunks(entry.start, start), (start, end), *_chunks(end, entry.end)):
            part = raw if (at, to) == (start, end) else torch.empty(to - at, dtype=torch.uint8)
            read_into(file, part, what)
            digest.update(part.numpy().data)
        self.check(entry, digest)
        return raw

    def check(self, entry: TensorEntry, digest: Digest) -> None:
        """Raise CorruptFileError if the bytes in `digest` are not the expected ones of a tensor."""
        if self.expected.get(self.key(entry), digest.hexdigest()) != digest.hexdigest():
            raise CorruptFileError(
                f"{self.source.where(entry.file)}: tensor {entry.name} is not what it was when the "
                "job began; restore the file and run the same command again"
            )

    def header_bytes(self, file: str) -> bytes:
        """The first 8 bytes and the JSON header of a weight file, verbatim."""
        with self.source.open(file) as stream:
            return raw_header(stream, size_of(stream), self.source.where(file))

    def parts(self) -> dict[str, str]:
        """SHA-256 of config.json and of each weight file's size and header, by file name.

        The parts of `identity`, so that a message can name the file that differs.
        """
        digests = {"config.json": hashlib.sha256((self.folder / "config.json").read_bytes())}
        for file in self.files:
            size = self.size(file)
            digests[file] = hashlib.sha256(str(size).encode() + b" " + self.header_bytes(file))
        if self.source.made_from:
            digests["stored files"] = hashlib.sha256(self.source.made_from.encode())
        return {name: digest.hexdigest() for name, digest in digests.items()}

    def identity(self) -> str:
        """SHA-256 over config.json and each weight file's name, size and header.

        Fast, and different for any change of architecture, layout or dtype. The weights' values
        are not covered: see `fingerprint_weight_file`.
        """
        digest = hashlib.sha256()
        parts = [(self.folder / "config.json").read_bytes()]
        if self.source.made_from:
            parts.append(self.source.made_from.encode())
        for file in self.files:
            size = self.size(file)
            parts += [file.encode(), str(size).encode(), self.header_bytes(file)]
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()


def _chunks(start: int, end: int) -> list[tuple[int, int]]:
    """Bytes start:end in ranges of at most CHUNK_BYTES."""
    return [(at, min(at + CHUNK_BYTES, end)) for at in range(start, end, CHUNK_BYTES)]


def size_of(file: Readable) -> int:
    """Bytes of an open file."""
    return os.fstat(file.fileno()).st_size if isinstance(file, io.FileIO) else file.size


def stream_state(file: Readable) -> tuple[object, ...]:
    """A value that changes when an open file is written to or replaced."""
    if not isinstance(file, io.FileIO):
        return file.state
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _header(source: ModelFolder, file: str) -> list[TensorEntry]:
    """The entries of a weight file's tensors, checked; only the header is read."""
    with source.open(file) as stream:
        return header_entries(stream, size_of(stream), source.where(file), file)


def fingerprint_weight_file(
    source: Path | ModelFolder, file: str, loaded: Collection[str] | None = None
) -> WeightFileFingerprint:
    """Read a weight file once, hash it, and check that values are finite.

    loaded: names of the tensors that must be finite; None for all. All are hashed.
    Memory is bounded by CHUNK_BYTES, or the buffer of an ObjectFile, whatever the tensors' sizes.
    Raises ModelError naming tensor and file for NaN or Inf in a floating-point tensor,
    CorruptFileError as `header_entries` does.
    """
    if isinstance(source, Path):
        source = LocalFolder(source)
    where, digest = source.where(file), hashlib.sha256()
    tensors = {}
    chunk = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    with source.open(file, ahead=True) as stream:
        entries = header_entries(stream, size_of(stream), where, file)
        stream.seek(0)
        digest.update(raw_header(stream, size_of(stream), where))
        for entry in entries:
            dtype, tensor_digest = torch_dtype(entry.dtype), hashlib.sha256()
            checked = dtype.is_floating_point and (loaded is None or entry.name in loaded)
            for start in range(entry.start, entry.end, CHUNK_BYTES):
                part = chunk[: min(CHUNK_BYTES, entry.end - start)]
                read_into(stream, part, f"{where}: tensor {entry.name}")
                digest.update(part.numpy().data)
                tensor_digest.update(part.numpy().data)
                if checked and not _finite(part.view(dtype)):
                    raise ModelError(
                        f"{where}: tensor {entry.name} holds NaN or Inf; the model is damaged, "
                        "download it again"
                    )
            tensors[entry.name] = tensor_digest.hexdigest()
        size = stream.tell()
    return WeightFileFingerprint(file, size, digest.hexdigest(), tensors)


def _finite(values: torch.Tensor) -> bool:
    if values.dtype.itemsize == 1:  # torch has no isfinite for 8-bit floats
        values = values.to(torch.float32)
    return bool(torch.isfinite(values).all())
