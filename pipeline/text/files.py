"""The files of a local text data set: one file, a folder of them, or a folder of `save_to_disk`.

    .txt                a file is one document
    .jsonl, .ndjson     one JSON object on a line
    .json               a list of JSON objects, or objects one after another
    .csv, .tsv          a header, and one document in a row
    .parquet, .arrow    one document in a row (.arrow: IPC file or stream, as `datasets` writes it)

Each but the last line's may be compressed: `.gz`, `.zst` or `.bz2` after the name. A folder is read
file by file in the order of the names, with its subfolders.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import DataError, InputError
from storage.files.commit import sha256_file
from storage.files.listing import files_below
from storage.files.names import printable
from storage.files.os_errors import file_error
from storage.files.small_file import read_small

PLAIN_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
ARROW_SUFFIXES = (".parquet", ".arrow")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
SUFFIXES_IN_WORDS = (
    ".txt, .jsonl, .json, .csv, .tsv (each also .gz, .zst or .bz2), .parquet, .arrow"
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# The first bytes of files that people rename: what they are, and the ending that says so.
_MAGIC = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
    b"BZh": ("bzip2", ".bz2"),
    b"PAR1": ("Parquet", ".parquet"),
    b"ARROW1": ("Arrow", ".arrow"),
    b"PK\x03\x04": ("zip", ""),
    b"\xfd7zXZ": ("xz", ""),
}
# A file up to this size is hashed whole; of a larger one so many pieces of 1 MiB are, at equal
# distances, so that a data set of a terabyte does not take an hour.
_HASHED_WHOLE = 1 << 30
_PIECES, _PIECE = 64, 1 << 20
_SPLITS = ("train", "test", "validation")  # one of these is read


@dataclass(frozen=True)
class TextPath:
    """A file of a data set. kind: its suffix without a compression's. compression: pyarrow's name
    of it, or None."""

    path: Path
    kind: str
    compression: str | None


def kind_of(path: Path) -> TextPath | None:
    """The kind of a file by the end of its name; None if it is none of a text data set."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression is not None:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    known = PLAIN_SUFFIXES if compression else PLAIN_SUFFIXES + ARROW_SUFFIXES
    return TextPath(path, kind, compression) if kind in known else None


def is_local(dataset: str) -> bool:
    """Whether `dataset` names a local file or folder, which need not exist, not a hub data set."""
    path = Path(dataset)
    identifier = dataset.partition(":")[0]
    return (
        kind_of(path) is not None
        or path.exists()
        or path.is_symlink()
        or not _HUB_ID.fullmatch(identifier)
        or identifier.startswith(".")
    )


def check_dataset(dataset: str) -> None:
    """Raises `DataError` where `dataset` names something local that cannot be read.

    Reads the first bytes of its files, no more, and asks no hub.
    """
    if is_local(dataset):
        check_files(text_files(dataset, _SPLITS))


def text_files(dataset: str, splits: Sequence[str]) -> list[TextPath]:
    """The files of a local data set, in the order in which they are read.

    splits: of a folder that `DatasetDict.save_to_disk` wrote, the first of these that it has.

    Raises DataError for one that is missing, cannot be listed, or has no file of a known kind.
    """
    path = Path(dataset)
    try:
        if not path.exists():
            link = " (a link to nothing)" if path.is_symlink() else ""
            raise DataError(
                f"no such file: {path}{link}: --dataset takes a file, a folder of files, or the id "
                "of a hub data set"
            )
        if path.is_dir():
            return _files_of_folder(path, splits)
        if not path.is_file():
            raise DataError(f"{path} is not a file: give one of {SUFFIXES_IN_WORDS}")
    except OSError as error:
        raise unreadable(path, error) from error
    file = kind_of(path)
    if file is None:
        raise DataError(
            f"{path}: unknown kind of file '{path.suffix}': give one of {SUFFIXES_IN_WORDS}"
        )
    return [file]


def unreadable(path: Path, error: OSError) -> InputError:
    """The error for a file that the system does not let be read."""
    if error.filename is None:
        error.filename = str(path)
    return file_error(error) or DataError(
        f"cannot read {path}: {error.strerror or error}; check that the file is whole"
    )


def _files_of_folder(folder: Path, splits: Sequence[str]) -> list[TextPath]:
    if (names := _splits_of(folder)) is not None:
        split = next((name for name in splits if name in names), None)
        if split is None:
            raise DataError(
                f"{folder} has no split {' or '.join(splits)}, but {', '.join(map(str, names))}: "
                f"name the folder of one, as in {folder}/SPLIT"
            )
        return _files_of_folder(folder / split, splits)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved_files(folder)
    files = [
        file
        for path in sorted(files_below(folder))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (file := kind_of(path)) is not None
    ]
    if not files:
        raise DataError(f"{folder} holds no file of {SUFFIXES_IN_WORDS}: name one as --dataset")
    return files


def _splits_of(folder: Path) -> list[str] | None:
    """The splits of a folder that `DatasetDict.save_to_disk` wrote; None for another folder."""
    if not (folder / "dataset_dict.json").is_file():
        return None
    names = _json_of(folder / "dataset_dict.json").get("splits")
    if not isinstance(names, list) or not all(Path(str(name)).name == name for name in names):
        raise DataError(f"{folder / 'dataset_dict.json'} names no splits: save the data set again")
    return names


def _saved_files(folder: Path) -> list[TextPath]:
    """The Arrow files that `Dataset.save_to_disk` wrote into `folder`."""
    state = _json_of(folder / "state.json")
    names = [entry.get("filename") for entry in state.get("_data_files", [])]
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise DataError(f"{folder / 'state.json'} names no data files: save the data set again")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            f"{folder} was saved with a selection of rows: call flatten_indices() before "
            "save_to_disk()"
        )
    files = [TextPath(folder / name, ".arrow", None) for name in names]
    for file in files:
        if not file.path.is_file():
            raise DataError(f"no such file: {file.path}, which {folder}/state.json names")
    return files


def _json_of(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_small(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}: save the data set again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object: save the data set again")
    return content


def check_files(files: Sequence[TextPath]) -> None:
    """Raises an `InputError` for the first file that cannot be opened or is not as it is named."""
    for file in files:
        _check_file(file)


def _check_file(file: TextPath) -> None:
    try:
        with file.path.open("rb") as opened:
            first = opened.read(8)
    except OSError as error:
        raise unreadable(file.path, error) from error
    actual = next((what for magic, what in _MAGIC.items() if first.startswith(magic)), None)
    if file.compression is not None:
        wanted = {"gzip": "gzip", "zstd": "zstd", "bz2": "bzip2"}[file.compression]
        if first and (actual is None or actual[0] != wanted):
            raise DataError(
                f"{file.path} is not a {wanted} file, as its name says"
                + (f", but a {actual[0]} file" if actual else "")
                + ": give it the ending of what it is"
            )
    elif actual is not None and file.kind in PLAIN_SUFFIXES:
        name, ending = actual
        remedy = f"rename it to end in {ending}" if ending else "unpack it"
        if ending in COMPRESSIONS:
            remedy = f"rename it to {file.path.name}{ending}"
        raise DataError(f"{file.path} is a {name} file, not {file.kind} text: {remedy}")


def local_identity(dataset: str) -> dict[str, Any]:
    """What identifies a local data set, without local paths: its `name` and its `sha256`.

    Of a single file up to 1 GiB the SHA-256 of its content. Otherwise the SHA-256 of a list: each
    file's name, size, and the hash of its content, of which files above 1 GiB give 64 pieces of
    1 MiB at equal distances; `hashed` says so. It covers all splits of a `DatasetDict`, whichever
    of them is read.
    """
    path = Path(dataset)
    files = _files_of_all_splits(dataset)
    sampled = any(_size(file.path) > _HASHED_WHOLE for file in files)
    if path.is_file() and not sampled:
        return {"name": printable(path.name), "sha256": _sha256(files[0].path)}
    listing = hashlib.sha256()
    for file in files:
        name = file.path.relative_to(path).as_posix() if path.is_dir() else path.name
        listing.update(
            f"{_size(file.path)} {_sha256(file.path)} {name}\n".encode("utf-8", "replace")
        )
    how = "64 pieces of 1 MiB of each file above 1 GiB" if sampled else "every file"
    return {
        "name": printable(path.resolve().name),
        "sha256": listing.hexdigest(),
        "hashed": f"{len(files)} files: {how}",
    }


def _files_of_all_splits(dataset: str) -> list[TextPath]:
    splits = _splits_of(Path(dataset))
    if splits is None:
        return text_files(dataset, _SPLITS)
    return [file for split in splits for file in text_files(str(Path(dataset, split)), _SPLITS)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error


def _sha256(path: Path) -> str:
    digest, size = hashlib.sha256(), _size(path)
    try:
        if size <= _HASHED_WHOLE:
            return sha256_file(path)
        with path.open("rb") as file:
            for index in range(_PIECES):
                file.seek((size - _PIECE) * index // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()
