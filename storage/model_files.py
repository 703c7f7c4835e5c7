"""The source model on disk: what is in its safetensors files, without loading it.

`ModelFiles.open` reads and checks the headers only; `read` brings one tensor, or some of its rows,
into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch

from storage.commit import CHUNK_BYTES
from storage.errors import CorruptFileError, ModelError
from storage.safetensors_format import (
    TensorEntry,
    raw_header,
    read_header,
    read_into,
    safetensors_dtype,
    torch_dtype,
)

__all__ = [
    "ModelFiles",
    "TensorEntry",
    "WeightFileFingerprint",
    "fingerprint_weight_file",
    "inside",
    "safetensors_dtype",
    "torch_dtype",
]

MAX_CONFIG_BYTES = 16 * 2**20

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Digest(Protocol):
    """What hashlib makes."""

    def update(self, data: Any, /) -> None:
        """Hashes more bytes."""
        ...

    def hexdigest(self) -> str:
        """The hash of all bytes so far."""
        ...


@dataclass(frozen=True)
class WeightFileFingerprint:
    """What one weight file contained when it was read through.

    sha256: of the whole file. tensors: name → sha256 of the tensor's bytes.
    """

    file: str
    bytes: int
    sha256: str
    tensors: dict[str, str]


class ModelFiles:
    """A model folder whose headers have been read and found consistent.

    folder: the model folder. files: names of its weight files, sorted. tensors: name → entry.
    config: the contents of config.json. index: name of the index file, None for a single file.
    expected: tensor → sha256 that its bytes must have wherever they are read; empty where no one
    has hashed the model yet.
    """

    def __init__(
        self,
        folder: Path,
        files: tuple[str, ...],
        tensors: dict[str, TensorEntry],
        config: dict[str, Any],
        index: str | None,
    ) -> None:
        self.folder = folder
        self.files = files
        self.tensors = tensors
        self.config = config
        self.index = index
        self.expected: Mapping[str, str] = {}
        # Tensor → state of its file when the tensor was last found to be the expected one.
        self._seen: dict[str, tuple[int, ...]] = {}

    @staticmethod
    def open(folder: Path) -> ModelFiles:
        """Read config, index and headers of `folder`, and check that they agree.

        Raises ModelError if something is missing or of an unsupported kind, CorruptFileError if
        something is there but malformed, truncated or contradictory. Weights are not read.
        """
        if not folder.is_dir():
            raise ModelError(f"{folder}: no such folder; give a Hugging Face model folder")
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: no config.json; give a Hugging Face model folder")
        config = _read_object(inside(folder, "config.json"))
        weight_map = _weight_map(folder)
        names = (SINGLE_FILE,) if weight_map is None else tuple(sorted(set(weight_map.values())))
        tensors: dict[str, TensorEntry] = {}
        for file in names:
            for entry in read_header(inside(folder, file), file):
                if entry.name in tensors:
                    raise CorruptFileError(
                        f"{folder}: tensor {entry.name} is in {tensors[entry.name].file} and in "
                        f"{file}; download the model again"
                    )
                tensors[entry.name] = entry
        if not tensors:
            raise ModelError(f"{folder}: the weight files hold no tensors")
        if weight_map is not None:
            _check_index(folder, weight_map, tensors)
        return ModelFiles(folder, names, tensors, config, INDEX_FILE if weight_map else None)

    def entry(self, name: str) -> TensorEntry:
        """Where tensor `name` lies; ModelError if the model has no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelError(
                f"{self.folder}: no tensor {name}; the weight files do not fit config.json"
            ) from None

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A copy of tensor `name` on the CPU, in its own dtype.

        rows: (start, stop) of the first dimension; None for the whole tensor.
        Only the bytes asked for are read; all of them where the tensor's hash is known and the
        file has changed since this process last compared it. Raises ModelError for an unknown name
        or dtype, CorruptFileError if the file became shorter or the tensor is not the `expected`
        one, IndexError if the rows are not there.
        """
        entry = self.entry(name)
        shape, start, end = entry.shape, entry.start, entry.end
        if rows is not None:
            if not shape or not 0 <= rows[0] <= rows[1] <= shape[0]:
                raise IndexError(f"{name} has shape {shape}: no rows {rows[0]}:{rows[1]}")
            row_bytes = (end - start) // shape[0] if shape[0] else 0
            shape = (rows[1] - rows[0], *shape[1:])
            start, end = start + rows[0] * row_bytes, start + rows[1] * row_bytes
        with open(inside(self.folder, entry.file), "rb", buffering=0) as file:
            state = _state(file.fileno())
            # A whole tensor is always compared. Its rows, read again for the solve, are those that
            # the calibration compared unless someone wrote to the file.
            compared = name in self.expected and (rows is None or self._seen.get(name) != state)
            whole = (entry.start, entry.end) if compared else (start, end)
            raw = torch.empty(whole[1] - whole[0], dtype=torch.uint8)
            file.seek(whole[0])
            read_into(file, raw, f"{self.folder / entry.file}: tensor {name}")
        if compared:
            self.check(entry, hashlib.sha256(raw.numpy().data))
            self._seen[name] = state
        if whole != (start, end):
            raw = raw[start - whole[0] : end - whole[0]].clone()  # lets go of the other rows
        return raw.view(torch_dtype(entry.dtype)).reshape(shape)

    def check(self, entry: TensorEntry, digest: Digest) -> None:
        """Raise CorruptFileError if the bytes in `digest` are not the expected ones of a tensor."""
        if self.expected.get(entry.name, digest.hexdigest()) != digest.hexdigest():
            raise CorruptFileError(
                f"{self.folder / entry.file}: tensor {entry.name} is not what it was when the job "
                "began; restore the file and run the same command again"
            )

    def header_bytes(self, file: str) -> bytes:
        """The first 8 bytes and the JSON header of a weight file, verbatim."""
        with open(inside(self.folder, file), "rb") as stream:
            return raw_header(stream, self.folder / file)

    def parts(self) -> dict[str, str]:
        """SHA-256 of config.json and of each weight file's size and header, by file name.

        What `identity` sums up, so that it can be told which file made the difference.
        """
        found = {"config.json": hashlib.sha256((self.folder / "config.json").read_bytes())}
        for file in self.files:
            size = (self.folder / file).stat().st_size
            found[file] = hashlib.sha256(str(size).encode() + b" " + self.header_bytes(file))
        return {name: digest.hexdigest() for name, digest in found.items()}

    def identity(self) -> str:
        """SHA-256 over config.json and each weight file's name, size and header.

        Cheap, and different for any change of architecture, layout or dtype; that the weights'
        values are the same is what `fingerprint_weight_file` says.
        """
        digest = hashlib.sha256()
        parts = [(self.folder / "config.json").read_bytes()]
        for file in self.files:
            size = (self.folder / file).stat().st_size
            parts += [file.encode(), str(size).encode(), self.header_bytes(file)]
        for part in parts:
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()


def _state(descriptor: int) -> tuple[int, ...]:
    """What changes when someone writes to an open file, or puts another in its place."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def inside(folder: Path, name: str) -> Path:
    """The path of a file of the model folder, following links no further than the model goes.

    A link may point within the folder, or, in a Hugging Face cache (`models--*/snapshots/REV`),
    within that model's own cache folder. Raises ModelError if the file is missing or not regular,
    CorruptFileError if the name leads elsewhere.
    """
    pure = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or pure.is_absolute() or ".." in pure.parts:
        raise CorruptFileError(f"{folder}: file name {name!r} leads out of the model folder")
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{path}: missing; download the model again") from error
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots" and roots[0].parent.parent.name.startswith("models--"):
        roots.append(roots[0].parent.parent)
    if not any(target.is_relative_to(root) for root in roots):
        raise CorruptFileError(
            f"{path}: a link to {target}, outside the model; put the file itself there"
        )
    if not target.is_file():
        raise ModelError(f"{path}: not a regular file; download the model again")
    return path


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the source model; CorruptFileError if it is none."""
    with open(path, "rb") as file:
        raw = file.read(MAX_CONFIG_BYTES + 1)
    try:
        if len(raw) > MAX_CONFIG_BYTES:
            raise ValueError(f"larger than {MAX_CONFIG_BYTES} bytes")
        data = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CorruptFileError(f"{path}: not a JSON object")
    return data


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor → weight file from the index; None if the model is one file, as transformers reads."""
    if os.path.lexists(folder / SINGLE_FILE):
        return None
    if not os.path.lexists(folder / INDEX_FILE):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            raise ModelError(
                f"{folder}: only pickled weights (.bin, .pt, .pth), which prox24 does not open; "
                "save the model with save_pretrained(), which writes safetensors"
            )
        raise ModelError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}")
    path = inside(folder, INDEX_FILE)
    weight_map = _read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{path}: no weight_map; download the file again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CorruptFileError(f"{path}: tensor {name} is said to be in {file!r}")
        inside(folder, file)
    return weight_map


def _check_index(folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorEntry]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            found = f"is in {tensors[name].file}" if name in tensors else "is in no file"
            raise CorruptFileError(
                f"{folder}: {INDEX_FILE} puts tensor {name} in {file}, but it {found}; "
                "download the model again"
            )
    for name, entry in tensors.items():
        if name not in weight_map:
            raise CorruptFileError(
                f"{folder}: tensor {name} of {entry.file} is not in {INDEX_FILE}; "
                "download the model again"
            )


def fingerprint_weight_file(folder: Path, file: str) -> WeightFileFingerprint:
    """Read a weight file through once, hashing it and checking that every value is finite.

    Memory is bounded by CHUNK_BYTES, whatever the tensors' sizes. Raises ModelError naming tensor
    and file for NaN or Inf in a floating-point tensor, CorruptFileError as `read_header` does.
    """
    path = inside(folder, file)
    entries = read_header(path, file)
    digest = hashlib.sha256()
    tensors = {}
    chunk = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    with open(path, "rb", buffering=0) as stream:
        digest.update(raw_header(stream, path))
        for entry in entries:
            dtype, own = torch_dtype(entry.dtype), hashlib.sha256()
            for start in range(entry.start, entry.end, CHUNK_BYTES):
                part = chunk[: min(CHUNK_BYTES, entry.end - start)]
                read_into(stream, part, f"{path}: tensor {entry.name}")
                digest.update(part.numpy().data)
                own.update(part.numpy().data)
                if dtype.is_floating_point and not _finite(part.view(dtype)):
                    raise ModelError(
                        f"{path}: tensor {entry.name} holds NaN or Inf; the model is damaged, "
                        "download it again"
                    )
            tensors[entry.name] = own.hexdigest()
        size = stream.tell()
    return WeightFileFingerprint(file, size, digest.hexdigest(), tensors)


def _finite(values: torch.Tensor) -> bool:
    if values.dtype.itemsize == 1:  # torch has no isfinite for 8-bit floats
        values = values.to(torch.float32)
    return bool(torch.isfinite(values).all())
