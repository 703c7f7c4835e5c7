"""Tries, before anything is computed, to write where a job writes at its end.

What a file system allows shows when it is tried, and not before: names, rights, quotas, mounts and
attributes of files each have a say. So a folder with files is made, flushed, renamed and removed
again where the real one will be, with names as long as the real ones. A trial leaves nothing; of
one that is killed, what is left has a name that the next owner sweeps, or no name at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from storage.errors import InputError, OutputError
from storage.files.commit import fsync_directory
from storage.files.os_errors import explained
from storage.files.temporary import temporary_name

_BYTES = b"prox24 can write here\n" * 200  # a page: less may be stored beside the file's name


@contextlib.contextmanager
def refusing(
    what: str, path: Path, remedy: str, kind: type[InputError] = OutputError
) -> Iterator[None]:
    """Raises `kind`, on one line, for what the system does not allow at `path`.

    what: what was to be made there, as in messages. remedy: what to do, for the end of the message.
    A full disk or quota is a ResourceError.
    """
    try:
        with explained(path):
            yield
    except OSError as error:
        raise kind(f"{what} {path} cannot be written: {_why(error, path)}; {remedy}") from error


def _why(error: OSError, path: Path) -> str:
    """What the system says, in terms of a folder that exists."""
    at = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
    found = _nearest(at if at.is_absolute() else path)
    user = f"user {os.geteuid()}"
    if error.errno == errno.ENAMETOOLONG:
        return _too_long(path, _nearest(path))
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{found} is not a folder"
    if error.errno == errno.EBUSY:
        return f"{found} is a mount point, which cannot be replaced"
    if error.errno == errno.EROFS:
        return f"{found} is on a file system that is read-only"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{user} may not write to {found} ({error.strerror})"
    if error.errno == errno.ELOOP:
        return "links on the way to it lead in a circle"
    return f"{found}: {error.strerror or error}"


def _too_long(path: Path, found: Path) -> str:
    longest = os.pathconf(found, "PC_NAME_MAX")
    for part in path.parts:
        count = len(os.fsencode(part))
        if count > longest:
            return f"{part[:20]}… has {count} bytes, a name there at most {longest}"
    whole = os.pathconf(found, "PC_PATH_MAX")
    return f"with the names below it, the path has more than the {whole} bytes that are allowed"


def _nearest(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    for folder in (path, *path.parents):
        with contextlib.suppress(OSError):
            os.stat(folder)
            return folder
    return Path("/")


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Makes a folder and its missing parents, and removes those that it made at the end."""
    new: list[Path] = []
    try:
        for path in reversed(_missing(folder)):
            new.append(path)  # first: a signal may come between the two
            try:
                os.mkdir(path)
            except FileExistsError:
                new.remove(path)  # another process was faster, or a link leads nowhere
                if not path.is_dir():
                    raise
        os.listdir(folder)  # raises where it is no folder, or not one that this user may look into
        yield
    finally:
        _for_each(_remove_empty, new[::-1])


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty any more
        os.rmdir(folder)


def _remove_all(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _for_each(remove: Callable[[Path], None], paths: Sequence[Path]) -> None:
    """Removes all paths; once more where a signal breaks it off, which further ones do not."""
    try:
        for path in paths:
            remove(path)
    except BaseException:
        for path in paths:
            remove(path)
        raise


def _missing(folder: Path) -> list[Path]:
    """The folders to make, innermost first."""
    missing = []
    for path in (folder, *folder.parents):
        try:
            os.stat(path)
            break
        except FileNotFoundError:
            missing.append(path)
    return missing


def try_folder(
    folder: Path,
    prefix: str,
    files: Iterable[str],
    final: str | None = None,
) -> None:
    """Makes a folder in `folder` with files in it, renames them, and removes all.

    prefix: begins the name of the folder; a former owner's are swept by it. files: names, relative
    to it, as long as the real ones. final: the name that the real folder gets at the end. Missing
    parents of `folder` are made, and removed. Raises OSError.
    """
    with made(folder):
        tried, moved = (folder / f"{prefix}{secrets.token_hex(6)}" for _ in range(2))
        try:
            os.mkdir(tried)
            for name in files:
                _try_file(tried / name)
            if final is not None:
                # By descriptor: the real one's path is not longer by the name of this folder.
                _try_name(tried, final)
            fsync_directory(tried)
            os.rename(tried, moved)
            fsync_directory(folder)
        finally:
            _for_each(_remove_all, (tried, moved))


def _try_file(path: Path) -> None:
    os.makedirs(path.parent, exist_ok=True)
    with open(path, "xb", buffering=0) as file:
        file.write(_BYTES)
        os.fsync(file.fileno())
    renamed = path.with_name("renamed")
    os.rename(path, renamed)
    os.unlink(renamed)


def _try_name(folder: Path, name: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.mkdir(name, dir_fd=descriptor)
        os.rename(name, "renamed", src_dir_fd=descriptor, dst_dir_fd=descriptor)
        os.rmdir("renamed", dir_fd=descriptor)
    finally:
        os.close(descriptor)


def try_replacing(folder: Path, aside: Path, guard: Callable[[], None]) -> None:
    """Tries whether an existing folder may be renamed and, with what it holds, removed.

    aside: the name that it would be renamed to; what restores it after a kill must know that name.
    guard: runs before it is renamed, and may raise to prevent that.
    An empty folder is renamed there and back. One with files stays where it is: the system is asked
    to remove it as if it were empty, which it refuses for its files alone. Raises OSError.
    """
    if not os.listdir(folder):
        guard()
        os.rename(folder, aside)
        os.rename(aside, folder)
        return
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        os.mkdir(folder)  # another process had just emptied it
    device = os.stat(folder).st_dev
    for inner, _, _ in os.walk(folder, onerror=_raise):
        if os.stat(inner).st_dev != device:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), inner)
        if not os.access(inner, os.W_OK | os.X_OK, effective_ids=True):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), inner)


def _raise(error: OSError) -> None:
    raise error


def require_folder(
    folder: Path, what: str, remedy: str, files: Iterable[str] = (), shown: Path | None = None
) -> None:
    """Raises OutputError or ResourceError where `replace_file` could not write `files` in `folder`.

    what, remedy: as in `refusing`. shown: the path in messages, if not `folder`. Missing parents
    are made, and removed again. Nothing is left, also where this is killed: the file that it writes
    has no name, or loses it at once on a file system that wants one.
    """
    with refusing(what, shown or folder, remedy), made(folder):
        _try_unnamed(folder)
        for path in (folder / name for name in files):
            if path.is_dir():
                raise OutputError(f"{what} {path} is a folder; {remedy}")
            for name in (path, temporary_name(path)):
                with contextlib.suppress(FileNotFoundError):
                    os.lstat(name)  # raises for a name that is too long


def require_file(path: Path, what: str, remedy: str) -> None:
    """As `require_folder`, for one file."""
    require_folder(path.parent, what, remedy, [path.name], shown=path)


def _try_unnamed(folder: Path) -> None:
    """Writes a file without a name in `folder`. Raises OSError."""
    try:
        descriptor = os.open(folder, os.O_WRONLY | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise
        named = temporary_name(folder / "x")
        descriptor = os.open(named, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.unlink(named)
    try:
        os.write(descriptor, _BYTES)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
