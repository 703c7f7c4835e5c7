"""The pruned model's folder: the source's files, with the values of some tensors replaced.

The folder is filled under a temporary name and renamed at the end, so that it appears complete or
not at all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from storage.errors import CorruptFileError, ModelError, OutputError
from storage.files.commit import (
    CHUNK_BYTES,
    fsync_directory,
    make_directory,
    replace_file,
    sha256_bytes,
    sha256_file,
)
from storage.files.hashing import HashingStream, StoredFile
from storage.files.listing import files_below
from storage.files.names import stem_of
from storage.files.os_errors import explained, require_readable
from storage.files.temporary import is_temporary
from storage.model.adapter import ADAPTER_CONFIG
from storage.model.files import ModelFiles, size_of, torch_dtype
from storage.model.folder import NOT_COPIED, SIDE_FOLDERS, inside
from storage.model.safetensors_format import TensorEntry, header_entries, read_into, tensor_bytes
from storage.object_store import Place, Readable
from storage.output.uploads import Guard, Uploads
from storage.run.checkpoints import BlockRecord

logger = logging.getLogger(__name__)

Replacement = Callable[[str], Iterable[torch.Tensor] | None]
"""Tensor name → its new value as consecutive pieces of rows, or None to copy the tensor."""

# Not copied from the source: each output gets a model card and results of its own.
_WRITTEN_ANEW = frozenset({"README.md", "prox24.json"})
_NO_SIDE_FILES = _WRITTEN_ANEW | {ADAPTER_CONFIG}


class ByteSink(Protocol):
    """A destination of bytes: a file, or an object in an object store."""

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append `data`; return its size in bytes."""
        ...


def write_weight_file(
    source: ModelFiles, file: str, destination: Path, replacement: Replacement
) -> StoredFile:
    """Write the new version of the source's weight file `file` to the path `destination`.

    The header is the source's, byte for byte. replacement: returns a tensor's new value as pieces
    of consecutive rows, in the tensor's dtype and on any device, or None to copy the tensor byte
    for byte. Memory is bounded by CHUNK_BYTES and one piece. The file appears complete, and
    replaces that of an earlier attempt.

    Raises ModelError if the pieces have another dtype, row length or number of rows than the
    tensor, CorruptFileError if the source has changed since it was opened or a tensor does not
    match `source.expected`, ResourceError if the disk is full.
    """
    with replace_file(destination) as writer:
        rewrite_weight_file(source, file, writer, replacement)
    return writer.stored(file)


def rewrite_weight_file(
    source: ModelFiles, file: str, writer: ByteSink, replacement: Replacement
) -> None:
    """Write the new version of a weight file to `writer`; otherwise as `write_weight_file`."""
    path = source.source.where(file)
    with source.source.open(file) as stream:
        writer.write(source.header_bytes(file))
        entries = header_entries(stream, size_of(stream), path, file)
        if entries != source.entries(file):
            raise CorruptFileError(f"{path}: changed while it was read; download it again")
        for entry in entries:
            pieces = replacement(entry.name)
            if pieces is None:
                _copy(source, stream, entry, writer, path)
            else:
                _replace(pieces, entry, writer, path)


def _copy(
    source: ModelFiles, stream: Readable, entry: TensorEntry, writer: ByteSink, path: str
) -> None:
    stream.seek(entry.start)
    digest = hashlib.sha256()
    buffer = torch.empty(min(CHUNK_BYTES, entry.end - entry.start), dtype=torch.uint8)
    for start in range(entry.start, entry.end, CHUNK_BYTES):
        part = buffer[: min(CHUNK_BYTES, entry.end - start)]
        read_into(stream, part, f"{path}: tensor {entry.name}")
        writer.write(part.numpy().data)
        digest.update(part.numpy().data)
    source.check(entry, digest)


def _replace(
    pieces: Iterable[torch.Tensor], entry: TensorEntry, writer: ByteSink, path: str
) -> None:
    dtype, rows = torch_dtype(entry.dtype), 0
    for piece in pieces:
        if piece.dtype != dtype or piece.shape[1:] != entry.shape[1:] or not piece.dim():
            raise ModelError(
                f"{path}: tensor {entry.name} is {entry.dtype} {entry.shape}, a new piece is "
                f"{piece.dtype} {tuple(piece.shape)}"
            )
        rows += piece.shape[0]
        raw = tensor_bytes(piece)
        for start in range(0, len(raw), CHUNK_BYTES):
            writer.write(raw[start : start + CHUNK_BYTES])
    if not entry.shape or rows != entry.shape[0]:
        raise ModelError(f"{path}: tensor {entry.name} is {entry.shape}, got {rows} new rows")


def side_files(source: ModelFiles) -> list[str]:
    """Names of the files to copy, sorted: those of the model that are not weights.

    These are all regular files at the top of the model folder (config, generation config,
    tokenizer, chat template, code, license, the index if the model has one) and the chat templates
    in additional_chat_templates/; not hidden files, weights of any format, an adapter's config,
    README.md or an earlier prox24.json.
    """
    names = [path.name for path in source.folder.iterdir() if _is_side_file(path, source.index)]
    for folder in SIDE_FOLDERS:
        if (source.folder / folder).is_dir():
            paths = (source.folder / folder).iterdir()
            names += [f"{folder}/{path.name}" for path in paths if _is_side_file(path, None)]
    return sorted(names)


def hash_side_files(source: ModelFiles) -> dict[str, str]:
    """Name → sha256 of the side files and of README.md, whose licence goes into the new card."""
    card = ["README.md"] if (source.folder / "README.md").is_file() else []
    return {name: sha256_file(inside(source.folder, name)) for name in side_files(source) + card}


def require_side_files(source: ModelFiles) -> None:
    """Raises OSError, with its path, for a side file that this process may not read.

    They are copied at the end of a job, which is late to find that out.
    """
    for name in (*side_files(source), "README.md"):
        if (source.folder / name).is_file():
            require_readable(inside(source.folder, name))


def copy_side_files(
    source: ModelFiles, destination: Path, expected: Mapping[str, str] | None = None
) -> list[str]:
    """Copy the side files into the folder `destination`; return their names, sorted.

    Links are followed within the model only (`inside`). The copies are durable when this returns.
    expected: what `hash_side_files` returned when the job began. Raises CorruptFileError, naming
    the file, if one has changed since then; ResourceError if the disk is full.
    """
    names = side_files(source)
    if expected is not None:
        names = sorted(name for name in expected if name != "README.md")
    for name in names:
        with (
            open(inside(source.folder, name), "rb") as stream,
            replace_file(destination / name) as writer,
        ):
            while chunk := stream.read(CHUNK_BYTES):
                writer.write(chunk)
            _require_unchanged(source, name, writer.sha256, (expected or {}).get(name))
    _require_card(source, expected or {})
    return names


def read_side_files(source: ModelFiles, expected: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """Name and contents of each side file, sorted by name; errors as in `copy_side_files`."""
    for name in sorted(name for name in expected if name != "README.md"):
        raw = inside(source.folder, name).read_bytes()
        _require_unchanged(source, name, sha256_bytes(raw), expected[name])
        yield name, raw
    _require_card(source, expected)


def _require_card(source: ModelFiles, expected: Mapping[str, str]) -> None:
    if "README.md" in expected:
        actual = sha256_file(inside(source.folder, "README.md"))
        _require_unchanged(source, "README.md", actual, expected["README.md"])


def _require_unchanged(source: ModelFiles, name: str, sha256: str, expected: str | None) -> None:
    if expected is not None and sha256 != expected:
        raise CorruptFileError(
            f"{source.source.where(name)}: not what it was when the job began; restore the file "
            "and run the same command again"
        )


def _is_side_file(path: Path, index: str | None) -> bool:
    name = path.name
    if name.startswith(".") or name in _NO_SIDE_FILES or not path.is_file():
        return False
    if name.endswith(".index.json"):
        return name == index  # the index of weights that are not copied would mislead
    return not NOT_COPIED.fullmatch(path.suffix.lower())


def publish_output(
    partial: Path, output: Path, overwrite: bool, guard: Callable[[], None] | None = None
) -> None:
    """Make everything in `partial` durable and rename it to `output`, in the same filesystem.

    overwrite: replace a non-empty folder. It is moved aside first, and deleted when the new one is
    in place; if the process dies in between, `recover_output` moves it back. `guard` (the lock's
    `assert_held`) runs before anything is moved or deleted. Raises OutputError if `output` is a
    file, is not empty and `overwrite` is False, contains `partial` or the working directory, or is
    on another filesystem.
    """
    output, partial = Path(os.path.realpath(output)), Path(os.path.realpath(partial))
    if not partial.is_dir():
        raise OutputError(f"{partial}: no such folder; run the same command again")
    recover_output(output, guard)
    _check_target(partial, output, overwrite)
    _make_durable(partial)
    aside, moved = name_aside(output), False
    if guard is not None:
        guard()
    try:
        with explained(output):
            if output.exists():
                os.rename(output, aside)
                moved = True
            os.rename(partial, output)
    except BaseException as error:
        # A signal may arrive before `moved` is set; an OSError then means that nothing was moved.
        if (moved or not isinstance(error, OSError)) and aside.is_dir() and not output.exists():
            # Without the guard: even after a takeover, this only undoes the rename above.
            os.rename(aside, output)
        if isinstance(error, OSError) and error.errno in (errno.EXDEV, errno.EBUSY):
            raise OutputError(
                f"{output}: {partial} cannot be renamed to it ({error.strerror}): a mount point "
                "or another filesystem; name a folder inside it"
            ) from error
        raise
    fsync_directory(output.parent)
    if partial.parent != output.parent:
        fsync_directory(partial.parent)
    _discard(aside)


def recover_output(output: Path, guard: Callable[[], None] | None = None) -> None:
    """Finish or undo a `publish_output` that was killed; does nothing otherwise.

    If the old folder was moved aside and no new one is in place, the old one is moved back; if both
    exist, the old one is deleted. `guard` as in `publish_output`.
    """
    output = Path(os.path.realpath(output))
    aside = name_aside(output)
    if not aside.is_dir():
        return
    if guard is not None:
        guard()
    if output.exists():
        _discard(aside)
    else:
        logger.info("restoring %s, which a killed job had moved aside", output)
        os.rename(aside, output)
        fsync_directory(output.parent)


def name_aside(output: Path) -> Path:
    """Where an output is moved while another takes its place; `recover_output` knows the name."""
    return output.with_name(f".{stem_of(output.name)}.prox24-replaced")


def _discard(aside: Path) -> None:
    if aside.is_dir():
        shutil.rmtree(aside)
        fsync_directory(aside.parent)


def _check_target(partial: Path, output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file; name a folder that does not exist yet")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(f"{output}: exists and is not empty; --overwrite replaces it")
    inside = [(partial, "the new model")]
    with contextlib.suppress(FileNotFoundError):  # Ray may delete a job's working directory
        inside.append((Path.cwd(), "the working directory"))
    for inner, what in inside:
        if output.exists() and inner.is_relative_to(output):
            raise OutputError(f"{output}: contains {what} and cannot be replaced; choose another")
    make_directory(output.parent)


def _make_durable(folder: Path) -> None:
    """fsync `folder` and all files and folders in it; delete temporary files of dead writers."""
    for path in files_below(folder):
        if is_temporary(path):
            path.unlink(missing_ok=True)
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with explained(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    for directory, _, _ in os.walk(folder, topdown=False):
        fsync_directory(Path(directory))


@dataclass(frozen=True)
class Sending:
    """What `write_files` needs for an object store: the arguments of `Uploads`, and the records of
    the blocks that are written."""

    folder: Path
    records: Sequence[BlockRecord]
    guard: Guard


def write_files(
    source: ModelFiles,
    files: Sequence[str],
    destination: Place,
    replacement: Replacement,
    sending: Sending,
) -> list[StoredFile]:
    """Write new versions of the source's weight files to a folder or an object store.

    Each as by `write_weight_file`.
    """
    if sending.guard is not None:
        sending.guard()
    if isinstance(destination, Path):
        return [write_weight_file(source, f, destination / f, replacement) for f in files]
    uploads = Uploads(sending.folder, destination, sending.guard)
    made_from = _made_from(sending.records)

    def write(file: str, sink: HashingStream) -> None:
        rewrite_weight_file(source, file, sink, replacement)

    return [uploads.send(file, made_from, partial(write, file)) for file in files]


def _made_from(records: Sequence[BlockRecord]) -> str:
    """SHA-256 that identifies the pruned blocks."""
    parts = [[record.block, [file.sha256 for file in record.files]] for record in records]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
