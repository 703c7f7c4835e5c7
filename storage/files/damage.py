"""Checks committed files against their records, for a repair of the damaged ones.

A repair recomputes the file, compares the hash taken during the write with the record, and only if
they are equal renames it over the damaged file (`commit.replace_by`). So however late a rename
comes, only the recorded bytes can get that name.
"""

from __future__ import annotations

from pathlib import Path

from storage.files.commit import sha256_file
from storage.files.hashing import StoredFile
from storage.files.os_errors import is_damage


def damage(path: Path, stored: StoredFile, *, hashed: bool) -> str | None:
    """What is wrong with a committed file, in a few words; None if it agrees with its record.

    hashed: compare the contents too, not only the size. Raises OSError where this process may not
    read it, which is no damage.
    """
    try:
        size = path.lstat().st_size
        if size != stored.bytes:
            return "empty" if not size else f"{size} bytes instead of {stored.bytes}"
        if hashed and sha256_file(path) != stored.sha256:
            return "altered since it was written"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        if not is_damage(error):
            raise
        return f"cannot be read, {error.strerror}"
    return None
