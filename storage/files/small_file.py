"""Files that people write or name: read whole, but never without end."""

from __future__ import annotations

from pathlib import Path

from storage.errors import FileError

MAX_SMALL_BYTES = 16 * 2**20
"""More than any config, model card or file of options takes."""


def read_small(path: Path) -> bytes:
    """The bytes of a file, or of a pipe.

    Raises OSError as `open` does, and FileError for more than MAX_SMALL_BYTES: a wrong file, or a
    device that has no end.
    """
    with open(path, "rb") as file:
        raw = file.read(MAX_SMALL_BYTES + 1)
    if len(raw) > MAX_SMALL_BYTES:
        raise FileError(
            f"{path}: larger than {MAX_SMALL_BYTES >> 20} MiB, which no such file is; name another"
        )
    return raw
