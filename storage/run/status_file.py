"""`status.json`: what a job is doing at present, for `prox24 status`.

No other file of a run directory depends on it, and the job never reads it. A write that fails is
ignored, and none is flushed to disk, so that a write costs no more than a rename.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from storage.errors import InputError, NumericalError
from storage.files.checked_json import encode_json
from storage.files.temporary import temporary_name

STATUS_SCHEMA = 1
STATUS_NAME = "status.json"

# Not RunInterrupted: a signal that arrives during a write must not be ignored.
_IGNORED = (OSError, InputError, NumericalError)


def write_status(directory: Path, payload: Mapping[str, Any], *, guard: Callable[[], None]) -> None:
    """Replace `status.json` in `directory` by `payload`, completely or not at all.

    `guard` (the lock's `assert_held`) runs just before the rename. Does nothing if the disk is
    full, the directory is gone or the lock is lost: the job notices these elsewhere.
    """
    path = directory / STATUS_NAME
    temporary = temporary_name(path)
    with contextlib.suppress(*_IGNORED):
        try:
            with open(temporary, "xb") as file:
                file.write(encode_json({"schema_version": STATUS_SCHEMA, **payload}, path))
            guard()
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_status(directory: Path, *, guard: Callable[[], None]) -> None:
    """Delete `status.json`, if there is one and the lock is still held."""
    with contextlib.suppress(*_IGNORED):
        guard()
        (directory / STATUS_NAME).unlink(missing_ok=True)
