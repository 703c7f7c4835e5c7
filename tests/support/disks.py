"""A disk of a test's own: a tmpfs in the mount namespace of the process that runs a job."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import CONTEXT

NEW_MOUNTS, NEW_USERS = 0x20000, 0x10000000
PRIVATE = 0x44000  # MS_REC | MS_PRIVATE
NO_MOUNTS = 77
DISK_BYTES = 80 << 20  # what the job asks for before it starts, and some more


class Disk:
    """A tmpfs at `folder` that only this process and its children see."""

    def __init__(self, folder: Path, size: int = DISK_BYTES) -> None:
        self.folder, self.ballast = folder, folder / "ballast"
        libc = self._libc = ctypes.CDLL(None, use_errno=True)
        users = f"0 {os.getuid()} 1", f"0 {os.getgid()} 1"
        if libc.unshare(NEW_MOUNTS):
            if libc.unshare(NEW_USERS | NEW_MOUNTS):
                os._exit(NO_MOUNTS)
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(users[0])
            Path("/proc/self/gid_map").write_text(users[1])
        folder.mkdir(exist_ok=True)
        libc.mount(b"none", b"/", None, PRIVATE, None)
        if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size}".encode()):
            os._exit(NO_MOUNTS)

    def make_read_only(self) -> None:
        """As a disk after an error, or one that is mounted so."""
        flags = 0x21  # MS_REMOUNT | MS_RDONLY
        if self._libc.mount(b"none", bytes(self.folder), None, flags, None):
            os._exit(NO_MOUNTS)

    def fill(self, spare: int = 0) -> None:
        """Leaves `spare` bytes."""
        descriptor = os.open(self.ballast, os.O_WRONLY | os.O_CREAT)
        written = 0
        for size in (1 << 20, 4096):
            try:
                while True:
                    written += os.write(descriptor, bytes(size))
            except OSError:
                continue
        os.ftruncate(descriptor, max(written - spare, 0))
        os.close(descriptor)

    def fill_when_opened(self, pattern: str, spare: int) -> None:
        """Fills it but for `spare` bytes, once, when this process opens such a file to write it."""
        armed = [True]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and armed[0] and isinstance(arguments[0], str | os.PathLike):
                creates = arguments[2] & os.O_CREAT
                if creates and re.search(pattern, os.fspath(arguments[0])):
                    armed[0] = False
                    self.fill(spare)

        sys.addaudithook(hook)


def without_rights() -> None:
    """Takes from this process what lets root write anywhere: modes and owners count for it too."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for kind in range(2):  # effective, permitted; the capabilities below 32
        # CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
        sets[kind] &= ~0b1111
    assert libc.capset(header, sets) == 0


def in_a_process(work: Callable[..., None], log: Path, *arguments: Any) -> None:
    """Runs `work` in a process of its own, where it may mount; what it asserts must hold."""
    process = CONTEXT.Process(target=_run, args=(work, log, arguments))
    process.start()
    process.join(240)
    if process.exitcode == NO_MOUNTS:
        pytest.skip("mounting a tmpfs is not allowed here")
    assert process.exitcode == 0, log.read_text()


def _run(work: Callable[..., None], log: Path, arguments: tuple[Any, ...]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    try:
        work(log, *arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def fails(log: Path, arguments: list[str]) -> str:
    """The command's only line of complaint; it ends with 2."""
    from cluster.command_line import run

    before = log.stat().st_size
    assert run(arguments) == 2
    text = log.read_text()[before:]
    assert "Traceback" not in text
    return next(line for line in text.splitlines() if line.startswith("prox24: "))
