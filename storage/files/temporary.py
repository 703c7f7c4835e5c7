"""Names of files that are not committed yet. No one reads such a file but who writes it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from storage.files.names import stem_of

_SUFFIX = ".tmp"


def temporary_name(path: Path) -> Path:
    """A unique hidden name beside `path`, which `is_temporary` recognizes."""
    stamp = f"{os.getpid()}-{secrets.token_hex(8)}"
    return path.with_name(f".{stem_of(path.name)}.{stamp}{_SUFFIX}")


def is_temporary(path: Path) -> bool:
    """Whether `temporary_name` made this name."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def final_name(path: Path) -> Path:
    """The path that a temporary name was made for; any other path as it is."""
    return path.with_name(path.name[1:].rsplit(".", 2)[0]) if is_temporary(path) else path
