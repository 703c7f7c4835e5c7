"""`status.json`: what a job is doing, for people who look in from outside.

It is the one file of a run directory that nothing relies on. The job never reads it, a write that
fails is forgotten, and none is flushed to disk: a write costs no more than a rename.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from storage.errors import InputError, NumericalError
from storage.files.checked_json import encode_json
from storage.files.commit import temporary_name

STATUS_SCHEMA = 1
STATUS_NAME = "status.json"

# Not RunInterrupted: a signal may arrive in the middle of a write, and must not be swallowed.
_FORGOTTEN = (OSError, InputError, NumericalError)


def write_status(directory: Path, payload: Mapping[str, Any], *, guard: Callable[[], None]) -> None:
    """Replace `status.json` in `directory` by `payload`, whole or not at all, if that can be done.

    `guard` (the lock's `assert_held`) runs just before the rename. Never raises for a full disk, a
    directory that is gone or a lock that was lost: the job has better ways to find that out.
    """
    path = directory / STATUS_NAME
    temporary = temporary_name(path)
    with contextlib.suppress(*_FORGOTTEN):
        try:
            with open(temporary, "xb") as file:
                file.write(encode_json({"schema_version": STATUS_SCHEMA, **payload}, path))
            guard()
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_status(directory: Path, *, guard: Callable[[], None]) -> None:
    """Delete `status.json`, if there is one and the lock is still held."""
    with contextlib.suppress(*_FORGOTTEN):
        guard()
        (directory / STATUS_NAME).unlink(missing_ok=True)
