"""What may be wrong with a file or folder that a user has, and what `prox24` must say of it.

A fault is put on a path and taken off again. Processes of these tests give up root's right to pass
over modes (`as_a_plain_user`), so that a mode means to them what it means to any user.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Root's rights to read, write and enter whatever the modes say: CAP_DAC_OVERRIDE and
# CAP_DAC_READ_SEARCH, as in linux/capability.h.
_OVERRIDES = 1 << 1 | 1 << 2
_VERSION_3 = 0x20080522
_PR_CAPBSET_DROP = 24


MISSING = "no-such-place"
"""Where a dangling link leads: a name in the same folder."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def as_a_plain_user() -> None:
    """From now on modes hold for this process and its children, though it may be root.

    Its user stays the same: it owns what it has written.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(_VERSION_3, 0), (_Sets * 2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    for number in (1, 2):
        # Else a program that root starts has it again.
        libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)
    for name in ("effective", "permitted", "inheritable"):
        setattr(sets[0], name, getattr(sets[0], name) & ~_OVERRIDES)
    assert libc.capset(ctypes.byref(header), sets) == 0, os.strerror(ctypes.get_errno())


def _unreadable(path: Path) -> None:
    path.chmod(0)


def _unwritable(path: Path) -> None:
    path.chmod(0o555 if path.is_dir() else 0o444)


def _folder(path: Path) -> None:
    path.mkdir()


def _file(path: Path) -> None:
    path.touch()


def _dangling(path: Path) -> None:
    path.symlink_to(path.with_name(MISSING))


def _full(path: Path) -> None:
    path.symlink_to("/dev/full")


@dataclass(frozen=True)
class Fault:
    """One thing that may be wrong. replaces: whether something else lies in the path's place."""

    name: str
    put: Callable[[Path], None]
    replaces: bool
    of_files: bool = True
    of_folders: bool = True

    def fits(self, path: Path) -> bool:
        """Whether it can be put on what lies at a path."""
        return self.of_folders if path.is_dir() else self.of_files


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("unreadable", _unreadable, False),
        Fault("unwritable", _unwritable, False),
        Fault("a folder", _folder, True, of_folders=False),
        Fault("a file", _file, True, of_files=False),
        Fault("a dangling link", _dangling, True),
        Fault("on a full device", _full, True, of_folders=False),
    )
}


@dataclass(frozen=True)
class Put:
    """A fault that lies on a path. mode: of what lay there; inode: of what lies there now."""

    path: Path
    fault: Fault
    aside: Path
    mode: int
    inode: int

    @staticmethod
    def on(path: Path, fault: Fault, aside: Path) -> Put:
        """Puts a fault on a path. aside: where to keep what lies there, on the same filesystem."""
        mode = path.stat().st_mode
        if fault.replaces:
            path.rename(aside)
        fault.put(path)
        return Put(path, fault, aside, mode, path.lstat().st_ino)

    def take_off(self) -> None:
        """The path is again what it was, unless it has been made anew, or deleted, meanwhile."""
        if not self.path.parent.is_dir():
            return
        # It may have got another name.
        entries = self.path.parent.iterdir()
        left = next((entry for entry in entries if entry.lstat().st_ino == self.inode), None)
        if not self.fault.replaces:
            if left is not None:
                left.chmod(self.mode)
            return
        if left is not None:
            remove(left)
        if not os.path.lexists(self.path):
            self.aside.rename(self.path)


def remove(path: Path) -> None:
    """Whatever lies there, if anything."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


_STAMP = re.compile(r"[0-9a-f]{12,32}")
# What a remedy begins with.
_REMEDY = re.compile(
    r"\b(add|choose|close|copy|create|delete|download|free|give|install|let|look|make|move|name|"
    r"press|put|raise|remove|replaces|restore|run|save|takes?|upload|use|wait)\b"
)


def complaint(errors: str, path: Path) -> str | None:
    """What is wrong with what a command wrote to stderr before it ended with 2; None for nothing.

    There must be one line of prox24, the last one, that names the path (or what lies in it, or its
    folder and its name), and after that what can be done.
    """
    lines = errors.splitlines()
    own = [line for line in lines if line.startswith("prox24: ")]
    if "Traceback" in errors or "unexpected" in errors:
        return "it is not expected"
    if len(own) != 1 or lines[-1] != own[0]:
        return f"{len(own)} lines, or not the last one"
    said, parent = starred(own[0]), starred(str(path.parent))
    named = parent in said and starred(path.name) in said
    if not named and f"{parent} exists and is not empty" not in said:
        return "the path is not named"
    if not _REMEDY.search(said.rpartition(parent)[2]):
        return "there is no remedy"
    return None


def starred(text: str) -> str:
    """The text with stars for the parts of names that are chosen at random."""
    return _STAMP.sub("*", text)
