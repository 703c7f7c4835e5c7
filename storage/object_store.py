"""Folders of an object store, `s3://` and `gs://`, through pyarrow's filesystems.

Credentials come from where the store's own tools find them: environment, profile, instance role.
They may not stand in the URI, which ends up in logs and records. A URI may say where the store is:

    s3://bucket/folder?endpoint_override=minio.internal:9000&scheme=http&region=eu-west-1

AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL count for `s3://` too, STORAGE_EMULATOR_HOST for `gs://`;
a `gs://` by http is a stand-in, which is sent no credentials. What fails for a moment is tried
again by the store's own client, with growing pauses; what still fails then is a ResourceError.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit

from storage.errors import ConfigError, ResourceError, first_line
from storage.files.hashing import HashingStream
from storage.files.names import absolute_path
from storage.object_client import filesystem, never_freed, reaching, store_errors

PART_BYTES = 8 * 2**20
"""What one request reads."""

LEAST_BYTES = 2**16
"""What a request reads at the least. pyarrow cannot try a read again whose answer, an error, is
longer than what was asked for."""

PARALLEL = 8
"""Requests at a time for one file; with PART_BYTES the bound on what is in memory."""

_SCHEMES = ("s3", "gs")
_OPTIONS = ("endpoint_override", "scheme", "region")
_URI = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True)
class ObjectFolder:
    """Everything under one prefix of a bucket: what a folder is on a disk.

    scheme: "s3" or "gs". path: bucket and prefix, without a slash at either end. options: what the
    URI says about the store's place. Made by `parse`.
    """

    scheme: str
    path: str
    options: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def parse(uri: str) -> ObjectFolder:
        """The folder that a URI names; ConfigError for one that cannot be used.

        The message never repeats what stands before an `@`.
        """
        parts = urlsplit(uri)
        scheme = {"gcs": "gs"}.get(parts.scheme.lower(), parts.scheme.lower())
        if scheme not in _SCHEMES:
            raise ConfigError(f"{parts.scheme}:// is not supported; give a folder, s3:// or gs://")
        if "@" in parts.netloc:
            raise ConfigError(
                f"{scheme}://...@{parts.netloc.rpartition('@')[2]}: a URI must not hold "
                "credentials; give them by environment, profile or role"
            )
        options = parse_qsl(parts.query, keep_blank_values=True)
        for name, value in options:
            if name not in _OPTIONS or not value:
                raise ConfigError(
                    f"{scheme}://{parts.netloc}{parts.path}: {name[:30]!r} is no option of a URI; "
                    f"there are {', '.join(_OPTIONS)}"
                )
        pieces = [piece for piece in parts.path.split("/") if piece]
        if not parts.netloc or not pieces or {".", ".."} & set(pieces) or parts.fragment:
            raise ConfigError(
                f"{scheme}://{parts.netloc}{parts.path}: name a bucket and a folder in it, as in "
                f"{scheme}://bucket/folder"
            )
        return ObjectFolder(scheme, "/".join([parts.netloc, *pieces]), tuple(sorted(options)))

    @property
    def uri(self) -> str:
        """What `parse` reads, for another process."""
        query = "&".join(f"{name}={value}" for name, value in self.options)
        return f"{self}?{query}" if query else str(self)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, name: str) -> ObjectFolder:
        return ObjectFolder(self.scheme, f"{self.path}/{name}", self.options)

    def is_relative_to(self, other: ObjectFolder) -> bool:
        """Whether this is `other` or lies in it, in what may be the same store."""
        stores = {dict(f.options).get("endpoint_override") for f in (self, other)} - {None}
        return (
            self.scheme == other.scheme
            and len(stores) < 2
            and f"{self.path}/".startswith(f"{other.path}/")
        )

    def files(self) -> dict[str, int]:
        """Name, relative to the folder, → size of all objects in it; empty if there are none."""
        import pyarrow.fs

        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True, recursive=True)
        with reaching(self):
            found = self._filesystem().get_file_info(selector)
        return {
            info.path.removeprefix(f"{self.path}/"): int(info.size)
            for info in found
            if info.is_file
        }

    def state(self, name: str) -> tuple[str, ...] | None:
        """What changes when an object is replaced: its size, ETag and time; None for no object."""
        if not self.holds(name):
            return None
        with self.open(name) as file:
            return file.state

    def holds(self, name: str) -> bool:
        """Whether there is an object of that name."""
        with reaching(self / name):
            info = self._filesystem().get_file_info(f"{self.path}/{name}")
        return bool(info.is_file)

    def open(self, name: str, *, ahead: bool = False) -> ObjectFile:
        """An object, open for reading; ResourceError if it is not there.

        ahead: it will be read from front to end.
        """
        with reaching(self / name):
            file = self._filesystem().open_input_file(f"{self.path}/{name}")
            return ObjectFile(file, str(self / name), ahead)

    def read(self, name: str, most: int) -> bytes | None:
        """A small object, of which no more than `most` bytes are read; None if it is not there."""
        if not self.holds(name):
            return None
        with self.open(name) as file:
            raw = bytearray(min(most, file.size))
            file.readinto(memoryview(raw))
            return bytes(raw)

    def delete(self, name: str) -> None:
        """Delete an object; one that is not there is no error."""
        with reaching(self / name), contextlib.suppress(FileNotFoundError):
            self._filesystem().delete_file(f"{self.path}/{name}")

    @contextlib.contextmanager
    def upload(self, name: str) -> Iterator[HashingStream]:
        """Write an object in parts; it appears whole when the block ends, or not at all.

        What was sent before an error, or before this process was killed, stays in the store as an
        incomplete upload, which no one sees: a lifecycle rule of the bucket deletes such. pyarrow
        has no call that aborts an upload (apache/arrow#40502), and a stream that is freed completes
        its object, also at the process's end: so a stream that was not closed is never freed.
        """
        kept = never_freed()
        with reaching(self / name):
            stream = self._filesystem().open_output_stream(f"{self.path}/{name}")
        kept.append(stream)
        with reaching(self / name):
            yield HashingStream(stream)
            stream.close()
        kept.remove(stream)

    def _filesystem(self) -> Any:
        return filesystem(self.scheme, self.path.partition("/")[0], self.options)


def is_uri(text: str) -> bool:
    """Whether `text` is a URI, supported or not, and no path."""
    return _URI.match(text) is not None


Place = Path | ObjectFolder
"""Where a model is, or goes."""


def place(text: str) -> Place:
    """The folder that the user named: on a disk (made absolute), or in an object store."""
    return ObjectFolder.parse(text) if is_uri(text) else absolute_path(text)


def absolute(where: Place) -> Place:
    """The same place, whatever the working directory becomes."""
    return where if isinstance(where, ObjectFolder) else absolute_path(where)


def resolved(where: Place) -> Place:
    """The same place, links followed."""
    return where if isinstance(where, ObjectFolder) else Path(os.path.realpath(where))


def lies_in(inner: Place, outer: Place) -> bool:
    """Whether `inner`, as `resolved` gives it, is `outer` or lies in it."""
    if isinstance(inner, ObjectFolder):
        return isinstance(outer, ObjectFolder) and inner.is_relative_to(outer)
    if not isinstance(outer, Path):
        return False
    return inner.is_relative_to(outer) or any(
        _same(path, outer) for path in (inner, *inner.parents)
    )


def _same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one folder, as by a mount or on a disk that ignores case."""
    with contextlib.suppress(OSError):
        return os.path.samefile(one, other)
    return False


def location(where: Place) -> str:
    """What `place` reads, for another process."""
    return where.uri if isinstance(where, ObjectFolder) else str(where)


class ObjectFile:
    """An object read like an unbuffered file: as much of it as asked, in parallel requests.

    size: in bytes. state: what changes when it is replaced. Memory is bounded by PARALLEL parts.
    """

    def __init__(self, file: Any, where: str, ahead: bool) -> None:
        self._file, self._where, self._ahead = file, where, ahead
        self.size = int(file.size())
        told = file.metadata() or {}
        names = {str(k).lower(): v.decode() for k, v in told.items() if isinstance(v, bytes)}
        kept = [names.get(key, "") for key in ("etag", "generation", "last-modified")]
        self.state: tuple[str, ...] = (str(self.size), *kept)
        self._position = 0
        # Requests under way, in order: (offset, bytes to come); the next begins at `_next`.
        self._parts: deque[tuple[int, Future[bytes]]] = deque()
        self._next = 0
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="prox24-object")

    def seek(self, position: int) -> int:
        """Where the next read begins, in bytes from the start."""
        if position != self._position:
            self._forget()
            self._position = self._next = position
        return position

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def read(self, count: int) -> bytes:
        """The next bytes, `count` unless the object ends."""
        raw = bytearray(max(0, min(count, self.size - self._position)))
        self.readinto(memoryview(raw))
        return bytes(raw)

    def readinto(self, view: memoryview) -> int:
        """Fill `view`, unless the object ends; returns how many bytes were read."""
        begin, stop = self._position, min(self._position + len(view), self.size)
        while self._position < stop:
            self._request(self.size if self._ahead else stop)
            offset, coming = self._parts[0]
            try:
                data = coming.result()
            except store_errors() as error:
                raise ResourceError(
                    f"{self._where}: {first_line(error)}; run the same command again"
                ) from error
            inner = self._position - offset
            count = min(len(data) - inner, stop - self._position)
            if count <= 0:  # the object is shorter than it was
                break
            done = self._position - begin
            view[done : done + count] = data[inner : inner + count]
            self._position += count
            if self._position == offset + len(data):
                self._parts.popleft()
        return self._position - begin

    def _request(self, stop: int) -> None:
        """Keeps requests under way for what comes next, up to the offset `stop`."""
        while self._next < stop and len(self._parts) < PARALLEL:
            size = min(PART_BYTES, max(stop - self._next, LEAST_BYTES), self.size - self._next)
            future = self._pool.submit(self._file.read_at, size, self._next)
            self._parts.append((self._next, future))
            self._next += size

    def _forget(self) -> None:
        for _, future in self._parts:
            future.cancel()
        self._parts.clear()

    def close(self) -> None:
        """Ends the requests under way and lets go of the object."""
        self._forget()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._file.close()

    def __enter__(self) -> ObjectFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MadeFile(Protocol):
    """A file that is computed as it is read. ObjectFile has the same methods.

    size: in bytes.
    """

    size: int

    @property
    def state(self) -> tuple[object, ...]:
        """A value that changes when the contents do."""
        ...

    def seek(self, position: int) -> int:
        """Where the next read begins, in bytes from the start."""
        ...

    def tell(self) -> int:
        """Where the next read begins."""
        ...

    def read(self, count: int) -> bytes:
        """The next bytes, `count` unless the file ends."""
        ...

    def readinto(self, view: memoryview) -> int:
        """Fill `view`, unless the file ends; returns how many bytes were read."""
        ...

    def close(self) -> None:
        """Free all resources."""
        ...

    def __enter__(self) -> MadeFile: ...

    def __exit__(self, *_: object) -> None: ...


Readable = io.FileIO | ObjectFile | MadeFile
"""A weight file open for reading."""
