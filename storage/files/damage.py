"""Whether a committed file is as its record says, for what can be made again where it is not.

Equal bytes take a damaged file's place by `commit.replace_by`, after the new file's hash, taken
while it was written, has been compared with what the record says: so whoever renames, and however
late, nothing but the recorded bytes ever gets that name.
"""

from __future__ import annotations

from pathlib import Path

from storage.files.commit import sha256_file
from storage.files.hashing import StoredFile


def damage(path: Path, stored: StoredFile, *, hashed: bool) -> str | None:
    """What is wrong with a committed file, in a few words; None if it is as its record says.

    hashed: compare the contents too, not just the size.
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
        return f"cannot be read, {error.strerror}"
    return None
