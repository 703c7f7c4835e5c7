"""Real signals at every commit point of a process, and between them.

`arm` wraps, in the calling process alone, everything by which it changes files: opening for
writing, writing, fsync, link, rename, unlink, mkdir, rmdir. Each has a point before and one after,
a write also one in the middle, when half of the data is in the file. Points are numbered in the
order in which they are passed. The same job passes the same ones, though where a thread writes
behind the main one their order may differ a little. At the chosen point the process sends itself
the signal, or the operation fails as the system makes it fail.
"""

from __future__ import annotations

import builtins
import functools
import os
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.files.commit import HashingWriter

_BY_DESCRIPTOR = ("write", "fsync", "pwrite")
_CALLS = ("link", "replace", "rename", "unlink", "mkdir", "rmdir", "fsync", "pwrite")


@dataclass(frozen=True)
class Injection:
    """What happens to a process: `number` arrives at one of its points.

    within: folder whose files count; other files have no points. at: the point's number, from 0, or
    a pattern that is searched in the names of points, and the first one found; None: nowhere.
    names: file to which the names of all points that were passed are written, one a line. error: an
    error number that is raised there in place of the signal, with a path where the operation names
    one.
    """

    within: Path
    at: int | str | None = None
    number: signal.Signals = signal.SIGKILL
    names: Path | None = None
    error: int = 0


def arm(injection: Injection) -> None:
    """Wraps the durable operations of this process."""
    points = _Points(injection)
    for name in _CALLS:
        setattr(os, name, points.around(name, getattr(os, name)))
    opened = builtins.open

    def open_(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if set(mode) & set("wxa+"):
            return points.around("open", opened)(file, mode, *more, **options)
        return opened(file, mode, *more, **options)

    descriptor_of = os.open

    def os_open(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            return int(points.around("open", descriptor_of)(path, flags, *more, **options))
        return descriptor_of(path, flags, *more, **options)

    write = HashingWriter.write

    def halves(writer: HashingWriter, data: Any) -> int:
        view = memoryview(data).cast("B")
        where = _path(writer.fileno())
        points.passed("before write", where)
        written = write(writer, view[: len(view) // 2])
        writer.flush()
        points.passed("amid write", where)
        return written + write(writer, view[len(view) // 2 :])

    setattr(builtins, "open", open_)  # noqa: B010 (mypy knows that they are not ours to change)
    setattr(os, "open", os_open)  # noqa: B010
    setattr(HashingWriter, "write", halves)  # noqa: B010


class _Points:
    def __init__(self, injection: Injection) -> None:
        self.injection = injection
        self.root = os.path.join(os.path.realpath(injection.within), "")
        self.count, self.done = 0, False
        self.lock = threading.Lock()
        self.log = -1
        if injection.names is not None:
            self.log = os.open(injection.names, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def passed(self, what: str, where: str) -> None:
        """One point. The heartbeat's thread has none: it would come in anywhere."""
        if threading.current_thread().name == "run-lock":
            return
        if not where.startswith(self.root):
            return
        with self.lock:
            number, self.count = self.count, self.count + 1
        name, at = f"{what} {where.removeprefix(self.root)}", self.injection.at
        if self.log >= 0:
            os.write(self.log, f"{name}\n".encode())
        if number == at if isinstance(at, int) else at and not self.done and re.search(at, name):
            self.done = True
            error = self.injection.error
            if not error:
                os.kill(os.getpid(), self.injection.number)
            elif what.split()[1] in _BY_DESCRIPTOR:
                raise OSError(error, os.strerror(error))
            else:
                raise OSError(error, os.strerror(error), where)

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            last = name in ("link", "replace", "rename")
            where = _path(arguments[1 if last else 0], options.get("dir_fd"))
            self.passed(f"before {name}", where)
            value = call(*arguments, **options)
            self.passed(f"after {name}", where)
            return value

        return wrapped


def _path(named: Any, folder: int | None = None) -> str:
    """The path that a call names, by a descriptor or relative to one."""
    if isinstance(named, int):
        return os.readlink(f"/proc/self/fd/{named}")
    start = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
    return os.path.join(start, os.fspath(named))
