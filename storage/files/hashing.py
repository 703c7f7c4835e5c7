"""Hashes of files, taken while they are written, and the entries of records that name them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol, cast

from storage.errors import CorruptFileError
from storage.files.checked_json import is_count


class Sink(Protocol):
    """A destination of bytes: a file, or an object in an object store."""

    def write(self, data: memoryview, /) -> object:
        """Append `data`."""


def is_plain_name(value: object) -> bool:
    """True for a file name without folders, which cannot lead out of its directory."""
    return (
        isinstance(value, str)
        and value not in ("", ".", "..")
        and not any(c in value for c in "/\\\0")
    )


def is_sha256(value: object) -> bool:
    """True for 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


@dataclass(frozen=True)
class StoredFile:
    """The entry of a file in a record.

    name: file name in the record's directory, without folders.
    sha256: of the whole file, lower-case hexadecimal.
    bytes: size of the file.
    rows: number of sequences or weight rows in it; 0 if it has no rows.
    """

    name: str
    sha256: str
    bytes: int
    rows: int = 0

    def to_json(self) -> dict[str, Any]:
        """The dictionary that `from_json` reads."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "rows": self.rows,
        }

    @staticmethod
    def from_json(data: object, source: str = "record") -> StoredFile:
        """Raises CorruptFileError, naming `source`, for anything `to_json` does not write."""
        if not isinstance(data, dict):
            raise CorruptFileError(f"{source}: a file entry is not an object")
        name, sha256 = data.get("name"), data.get("sha256")
        size, rows = data.get("bytes"), data.get("rows")
        if not (is_plain_name(name) and is_sha256(sha256) and is_count(size) and is_count(rows)):
            raise CorruptFileError(f"{source}: a file entry is malformed")
        return StoredFile(str(name), str(sha256), cast(int, size), cast(int, rows))


class HashingStream:
    """Hashes bytes and passes them on to a sink."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self._digest, self._bytes = sink, hashlib.sha256(), 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append `data` (any contiguous buffer); return its size in bytes."""
        view = memoryview(data).cast("B")
        self._sink.write(view)
        self._digest.update(view)
        self._bytes += view.nbytes
        return view.nbytes

    @property
    def sha256(self) -> str:
        """SHA-256 of everything written so far, lower-case hexadecimal."""
        return self._digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Bytes written so far."""
        return self._bytes

    def stored(self, name: str, rows: int = 0) -> StoredFile:
        """The record's entry for what was written. Arguments as in `StoredFile`."""
        return StoredFile(name, self.sha256, self._bytes, rows)
