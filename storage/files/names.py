"""Names of files: hidden ones made of others, and names as text.

A file system allows a name of some 255 bytes. Hidden temporary names are made of the name that the
file will get; of a long one they take the beginning and a hash, so that any name that a file system
allows has temporary names that it allows too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

_LONGEST = 60  # bytes of a name that stand in a hidden one
_DIGITS = 16


def stem_of(name: str) -> str:
    """`name`, or of one of more than 60 bytes its beginning and a hash of all of it."""
    raw = os.fsencode(name)
    if len(raw) <= _LONGEST:
        return name
    digest = hashlib.sha256(raw).hexdigest()[:_DIGITS]
    # No character is cut in two: some file systems take UTF-8 only.
    return f"{raw[: _LONGEST - _DIGITS - 1].decode('utf-8', 'ignore')}~{digest}"


def absolute_path(path: str | Path) -> Path:
    """A path that does not depend on the current folder, with a name at its end.

    Links are followed only where `..` is in it: what lies above a link depends on where it leads.
    """
    absolute = Path(path).absolute()
    return Path(os.path.realpath(absolute)) if ".." in absolute.parts else absolute


def printable(text: str) -> str:
    """`text` with control characters, and bytes that are not UTF-8, written as escapes.

    For a path in a message, a table or a page: it stays on its line and cannot command a terminal,
    and any encoding can write it.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python stands for a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def is_utf8(path: str) -> bool:
    """Whether the bytes of a path are UTF-8."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def by_utf8_name(path: Path) -> Iterator[Path]:
    """The file or folder by a path of UTF-8: libraries written in Rust or C++ take no other."""
    if is_utf8(str(path)):
        yield path
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def shell_line(arguments: Iterable[str]) -> str:
    """A command line that a shell (bash, zsh, ksh) takes apart into `arguments`, on one line."""
    return " ".join(map(_quoted, arguments))


def _quoted(argument: str) -> str:
    if argument.isprintable():
        return shlex.quote(argument)
    parts = []
    for character in argument:
        if character in "\\'":
            parts.append(f"\\{character}")
        elif character.isprintable():
            parts.append(character)
        else:
            parts += [f"\\x{byte:02x}" for byte in os.fsencode(character)]
    return f"$'{''.join(parts)}'"
