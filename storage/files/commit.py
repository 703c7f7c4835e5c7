"""Durable files: hashing, create-if-absent, replace.

The commit protocol, which everything else in this package relies on:

1. A worker writes a file under a name that no other attempt uses (`write_new_file`): created with
   O_EXCL, hashed while it is written, flushed to disk together with its directory entry. It is
   never renamed, so a process that was frozen and continues late cannot overwrite another's file.
   (The one exception: a repair replaces a damaged file by equal bytes, see `storage.files.damage`.)
2. The owner of the run's lock publishes a record that names those files and their hashes
   (`publish_json`): written under a temporary name, flushed, then linked to its final name, which
   fails if that name exists. This link is the commit. `guard` (the lock's `assert_held`) runs
   between the flush and the link.
3. A new owner of the lock first deletes all temporary files, then reads the records. A link or a
   rename needs its temporary file, so a displaced owner can no longer commit anything.

Required of the filesystem: atomic link and rename, and close-to-open consistency, as NFS has it (a
file that was flushed and closed on one host reads the same when another host opens it).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from storage.errors import CorruptFileError, RunDirectoryError
from storage.files.checked_json import MAX_JSON_BYTES, decode_json, encode_json
from storage.files.hashing import HashingStream, StoredFile
from storage.files.os_errors import explained, is_damage
from storage.files.temporary import temporary_name

logger = logging.getLogger(__name__)

CHUNK_BYTES = 8 * 2**20
"""Bytes of a file that are in memory while it is hashed or copied."""


def sha256_bytes(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 of `data`, lower-case hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in chunks; raises OSError as `open` does."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def open_regular_file(path: Path) -> BinaryIO:
    """Open a file for reading that must be a regular file, as all that prox24 writes are.

    Raises OSError for a link, which could lead out of the run directory, and for a pipe or a
    device, on which a reader would wait forever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def verify_file(path: Path, sha256: str) -> None:
    """Raise CorruptFileError unless `path` is a regular file with this hash.

    Raises OSError where this process may not read it, which is no damage.
    """
    try:
        open_regular_file(path).close()
        actual = sha256_file(path)
    except OSError as error:
        if not is_damage(error):
            raise
        raise CorruptFileError(f"{path}: cannot be read ({error.strerror})") from error
    if actual != sha256:
        raise CorruptFileError(f"{path}: sha256 is {actual[:12]}…, was {sha256[:12]}… when written")


def verify_files(directory: Path, files: Sequence[StoredFile], threads: int = 1) -> None:
    """`verify_file` of each of the files in `directory`, as many at a time as there are threads.

    Hashing and reading release Python's lock. Of several damaged files the error names the first.
    Returns or raises when no thread reads any more.
    """

    def verify(file: StoredFile) -> None:
        verify_file(directory / file.name, file.sha256)

    lanes = min(threads, len(files))
    if lanes < 2:
        for file in files:
            verify(file)
        return
    with ThreadPoolExecutor(lanes, thread_name_prefix="prox24-verify") as pool:
        for _ in pool.map(verify, files):
            pass


def fsync_directory(path: Path) -> None:
    """Make the entries of a directory durable: a new file's name is not before this returns.

    Does nothing on a filesystem that has no such operation.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with explained(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents durably; an existing one is left as it is."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with explained(path):
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


class HashingWriter(HashingStream):
    """A binary file open for writing that hashes what is written.

    Nothing is read back. The hash is that of the intended bytes, so a later check detects a disk
    that stored others.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._file = file

    def tell(self) -> int:
        """Bytes written so far."""
        return self._bytes

    def flush(self) -> None:
        """Hand buffered bytes to the operating system; they are not durable yet."""
        self._file.flush()

    def close(self) -> None:
        """Make the contents durable and close; a second call does nothing."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def abandon(self) -> None:
        """Close without flushing; errors are ignored."""
        with contextlib.suppress(OSError):
            self._file.close()

    @property
    def closed(self) -> bool:
        """Whether `close` or `abandon` was called."""
        return self._file.closed

    def fileno(self) -> int:
        """The file descriptor."""
        return self._file.fileno()

    def readable(self) -> bool:
        """False. Part of pyarrow's file interface."""
        return False

    def writable(self) -> bool:
        """True. Part of pyarrow's file interface."""
        return True

    def seekable(self) -> bool:
        """False: bytes that were hashed cannot be changed."""
        return False


@contextlib.contextmanager
def write_new_file(path: Path) -> Iterator[HashingWriter]:
    """Create `path`, a name that only this attempt uses, and write it durably.

    After the `with` block the contents and the directory entry are on disk; if the block raises,
    the file is removed. Missing parents are created. Raises FileExistsError if the name exists,
    ResourceError if the disk or the quota is full.
    """
    make_directory(path.parent)
    with explained(path), open(path, "xb") as file:
        writer = HashingWriter(file)
        try:
            yield writer
            writer.close()
            fsync_directory(path.parent)
        except BaseException:
            writer.abandon()
            path.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def replace_file(path: Path, guard: Callable[[], None] | None = None) -> Iterator[HashingWriter]:
    """Write a temporary file and rename it to `path` when the `with` block ends without an error.

    For the only owner of `path`: with two writers, the later rename wins. `guard` runs just before
    the rename and may raise to prevent it. Raises ResourceError if the disk is full.
    """
    temporary = temporary_name(path)
    with write_new_file(temporary) as writer:
        yield writer
    replace_by(temporary, path, guard)


def replace_by(temporary: Path, path: Path, guard: Callable[[], None] | None = None) -> None:
    """Rename `temporary`, a durable file with a `temporary_name` of `path`, to `path`.

    `guard` as in `replace_file`. Raises RunDirectoryError if the temporary file was deleted,
    because another owner has taken the run directory over.
    """
    try:
        if guard is not None:
            guard()
        with explained(path):
            os.replace(temporary, path)
            fsync_directory(path.parent)
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"{path}: not written, another process took the run directory over; let that one go on"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def publish_json(
    path: Path, payload: Mapping[str, Any], *, guard: Callable[[], None] | None = None
) -> None:
    """Commit: create `path` with `payload`, complete or not at all, if no such file exists.

    Does nothing if the file exists with the same content; raises FileExistsError if it exists with
    another. `guard` (a lock's `assert_held`) runs when the data is on disk, just before it gets its
    name. Raises RunDirectoryError if the temporary file was deleted meanwhile (another owner has
    taken the run directory over) or if the filesystem has no hard links; NumericalError for NaN or
    Inf, which JSON cannot represent.
    """
    encoded = encode_json(payload, path)
    temporary = temporary_name(path)
    with write_new_file(temporary) as writer:
        writer.write(encoded)
    try:
        if guard is not None:
            guard()
        _link(temporary, path, encoded)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def _link(temporary: Path, path: Path, encoded: bytes) -> None:
    try:
        with explained(path):
            os.link(temporary, path)
    except FileExistsError:
        # This also happens if a network filesystem made the link and lost its answer.
        if path.read_bytes() != encoded:
            raise FileExistsError(
                errno.EEXIST, "exists with other content, and is never replaced", str(path)
            ) from None
    except FileNotFoundError as error:
        raise RunDirectoryError(
            f"{path}: not committed, another process took the run directory over; "
            "let that one go on"
        ) from error
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise RunDirectoryError(
                f"{path.parent}: the filesystem has no hard links, which committing needs; "
                "use another --run-dir"
            ) from error
        raise


def replace_json(
    path: Path, payload: Mapping[str, Any], *, guard: Callable[[], None] | None = None
) -> None:
    """Write `payload` to `path`, complete or not at all, replacing an existing file.

    `guard` and the errors are those of `replace_file`, and NumericalError as in `publish_json`.
    """
    encoded = encode_json(payload, path)
    with replace_file(path, guard) as writer:
        writer.write(encoded)


def read_json(path: Path, schema: int) -> dict[str, Any]:
    """Read what `publish_json` or `replace_json` wrote; the checksum is verified and left out.

    Raises CorruptFileError, naming the path, if the file is missing, altered or not such a file,
    and RunDirectoryError if its `schema_version` is not `schema`. Raises OSError where this process
    may not read it, which is no damage.
    """
    try:
        with open_regular_file(path) as file:
            # Not `read(MAX_JSON_BYTES + 1)`, which would allocate that much memory first.
            size = os.fstat(file.fileno()).st_size
            raw = file.read(min(size, MAX_JSON_BYTES) + 1)
    except OSError as error:
        if not is_damage(error):
            raise
        raise CorruptFileError(
            f"{path}: cannot be read ({error.strerror}); restore it or start a new run directory"
        ) from error
    return decode_json(raw, path, schema)
