"""What the system refuses, said to people: which file or folder, why, and what to do about it.

Code that opens, lists or writes files need not catch `OSError`. Where work ends (a phase of a
worker, a command) `file_error` makes of one that names a path an error of the tree. So the rule for
other code is only that the path must be known: `named` adds it where the system leaves it out, as
it does when an open file is read or written.

Two kinds of code look at the number themselves. Readers of committed files take what is missing or
not whole as damage, which can be repaired; `is_damage` tells that from a file that is whole but not
theirs to read. And code that gives a number a meaning of its own: `commit` does of a lost link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
from collections.abc import Iterator
from pathlib import Path

from storage.errors import FileError, InputError, ResourceError
from storage.files.temporary import final_name

_AGAIN = "and run the same command again"
_FULL = {  # error number of a write without room → remedy
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
}
_DENIED = (errno.EACCES, errno.EPERM)
_DISK = f"look at the disk or the network filesystem that it is on (dmesg), {_AGAIN}"
_OTHERS = {  # error number → remedy
    errno.EROFS: "its filesystem is mounted read-only: name a path on another one",
    errno.EISDIR: "move the folder away, or name another path",
    errno.ENOTEMPTY: "move away what is in it, or name another path",
    errno.ELOOP: "put the file or folder itself there in place of the link",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.EMFILE: f"raise the limit on open files (ulimit -n) {_AGAIN}",
    errno.ENFILE: f"let other programs close files (sysctl fs.file-max) {_AGAIN}",
    errno.EBUSY: "it is in use, or a mount point: name another path",
    errno.ETXTBSY: "it is a program that runs: name another path",
    errno.EXDEV: "name a path on the same filesystem",
    errno.EOPNOTSUPP: "its filesystem cannot do that: name a path on another one",
    errno.ENOSYS: "its filesystem cannot do that: name a path on another one",
    errno.ENOLCK: "its filesystem has no locks: name a path on another one",
    errno.ENODEV: "name a regular file",
    errno.ENXIO: "name a regular file",
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
    errno.ENOTCONN: _DISK,
    errno.ETIMEDOUT: _DISK,
    errno.EHOSTDOWN: _DISK,
    errno.EREMOTEIO: _DISK,
    errno.EUCLEAN: _DISK,
}
# What says nothing of the bytes in a file, but of who asks, and when.
_NOT_DAMAGE = (*_DENIED, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN)


def file_error(error: BaseException) -> InputError | None:
    """The error for people of an `OSError` that names a path; None of all other errors.

    ResourceError for a full disk, FileError for everything else. Looks at the filesystem to say
    which folder or right is in the way, so call it where the error occurred: on that node, as that
    user.
    """
    if not isinstance(error, OSError) or error.errno is None:
        return None
    why = error.strerror or os.strerror(error.errno)
    path = _path_of(error)
    if path is None:
        return _without_path(error, why)
    if error.errno in _FULL:
        return ResourceError(f"{path}: not written, {why}; {_FULL[error.errno]} {_AGAIN}")
    if error.errno in _DENIED:
        return FileError(f"{path}: {why}; {_right_for(path)}")
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        return FileError(f"{path}: {why}; {_what_is_in_the_way(path, error.errno)}")
    remedy = _OTHERS.get(error.errno)
    return None if remedy is None else FileError(f"{path}: {why}; {remedy}")


@contextlib.contextmanager
def file_errors(option: str = "") -> Iterator[None]:
    """Raises what `file_error` makes of an error inside; other errors pass unchanged.

    option: that names the path, such as `--config`; the message begins with it.
    """
    try:
        yield
    except (OSError, FileError) as error:
        told = error if isinstance(error, FileError) else file_error(error)
        if told is None or (told is error and not option):
            raise
        raise type(told)(f"{option} {told}".lstrip()) from error


def raise_file_error(error: BaseException) -> None:
    """For handlers of whatever a library raises: raise FileError where it is a file's fault.

    The library may have raised an error of its own from it, or while it handled it. Of those that
    are missing nothing is said: libraries look for files that need not be there.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if not isinstance(link, FileNotFoundError | NotADirectoryError | FileExistsError):
            told = file_error(link)
            if told is not None:
                raise told from error
        link = link.__cause__ or link.__context__


def is_damage(error: OSError) -> bool:
    """Whether a file that cannot be read is missing, unreadable for anyone, or no regular file.

    False where the system denies it to this user or this process: then the file may be whole, and
    making it again would be wrong.
    """
    return error.errno not in _NOT_DAMAGE


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Adds the path to an OSError that has none. Raises ResourceError for a full disk or quota."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        if error.errno in _FULL and (told := file_error(error)) is not None:
            raise told from error
        raise


def require_readable(path: Path) -> None:
    """Raises OSError, with the path, unless this process may read the file; reads nothing of it.

    For files that a library will open: its own error may not name the file.
    """
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))


def _path_of(error: OSError) -> Path | None:
    """The path that an error is about: of two, as for a rename, the one that is not temporary."""
    for name in (error.filename2, error.filename):
        if isinstance(name, bytes):
            name = os.fsdecode(name)
        if isinstance(name, str | os.PathLike) and str(name):
            return final_name(Path(name))
    return None


def _right_for(path: Path) -> str:
    """Which right is missing on the way to a path, and that to give it is the remedy."""
    user = _user()
    for folder in reversed(path.absolute().parents):
        if os.path.isdir(folder) and not os.access(folder, os.X_OK):
            return f"let {user} enter {folder} (chmod, chown), or name another path"
    if not os.path.lexists(path):
        return f"let {user} create files in {path.parent} (chmod, chown), or name another path"
    for right, word in ((os.R_OK, "read"), (os.W_OK, "write"), (os.X_OK, "enter")):
        if not os.access(path, right) and (right != os.X_OK or path.is_dir()):
            return f"let {user} {word} it (chmod, chown), or name another path"
    if not os.access(path.parent, os.W_OK):
        return f"let {user} replace files in {path.parent} (chmod, chown), or name another path"
    return f"let {user} use it, or name another path"


def _user() -> str:
    """The user of this process, for people."""
    number = os.geteuid()
    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"


def _what_is_in_the_way(path: Path, number: int) -> str:
    """The first part of a path that is missing, or that is no folder, and what to do."""
    for part in (*reversed(path.absolute().parents), path):
        if os.path.islink(part) and not os.path.exists(part):
            return f"{part} is a link to {os.readlink(part)}, which is missing: put it there"
        if not os.path.lexists(part):
            return f"create {part}, or name another path"
        if part != path and not os.path.isdir(part):
            return f"{part} is not a folder: move it away, or name another path"
    if number == errno.ENOENT:
        return f"let no other program delete files there, {_AGAIN}"
    kind = "there is a folder" if os.path.isdir(path) else "it is not a folder"
    return f"{kind}: move it away, or name another path"


def _without_path(error: OSError, why: str) -> FileError | None:
    """Of errors without a path, those that are of a folder all the same."""
    if not isinstance(error, FileNotFoundError):
        return None
    if why.startswith("No usable temporary directory"):  # as tempfile says it
        return FileError(f"{why}; set TMPDIR to a folder that {_user()} can write to")
    try:
        os.getcwd()
    except FileNotFoundError:
        return FileError(f"the working directory: {why}; it was deleted: cd to one that exists")
    return None
