"""Checks with marker files that every node sees the folders that a job needs.

The driver creates a new folder with a marker inside each of them; every rank reads the marker and
writes an answer, which the driver reads. So both have seen what the other wrote. A folder that has
the same path on every node but is not shared does not pass.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.errors import OutputError

# Time that a network filesystem may take to show on one node what another has written.
_PATIENCE_SECONDS = 3.0
_POLL_SECONDS = 0.1
_MARKER = "driver"
_DIGITS = 12


@dataclass(frozen=True)
class SharedFolder:
    """A folder that all nodes must share.

    what: its name in messages, with its option. prefix: begins the names of the temporary folders
    of the check; one that is recognized and deleted after a kill.
    """

    what: str
    path: str
    prefix: str


@dataclass(frozen=True)
class Marked:
    """A folder with a marker file. place: the temporary folder. word: the marker's content."""

    folder: SharedFolder
    place: str
    word: str


@contextlib.contextmanager
def marked(folders: Sequence[SharedFolder]) -> Iterator[tuple[Marked, ...]]:
    """The driver's part: puts a marker in every folder, and deletes it at the end.

    Raises `OutputError` for a folder that the driver cannot write to.
    """
    made: list[Marked] = []
    try:
        for folder in folders:
            # A new name: a node may have cached that an old one does not exist.
            word = secrets.token_hex(_DIGITS // 2)
            place = Path(folder.path) / f"{folder.prefix}{word}"
            try:
                place.mkdir()
                made.append(Marked(folder, str(place), word))
                (place / _MARKER).write_text(word, encoding="utf-8")
            except OSError as error:
                raise OutputError(
                    f"{folder.what}, {folder.path}, cannot be written to ({error.strerror})"
                ) from error
        yield tuple(made)
    finally:
        for mark in made:
            shutil.rmtree(mark.place, ignore_errors=True)


def answer(marks: Sequence[Marked], rank: int) -> list[str]:
    """A rank's part: reads each marker and writes its answer. Returns what is wrong.

    Each problem is a phrase whose subject is the node: "does not see the run directory, ...".
    """
    problems = []
    for mark in marks:
        where = f"{mark.folder.what}, {mark.folder.path}"
        place = Path(mark.place)
        if not _appears(place / _MARKER, mark.word):
            problems.append(f"does not see what the driver writes to {where}")
            continue
        try:
            (place / _answer_name(rank)).write_text(mark.word, encoding="utf-8")
        except OSError as error:
            problems.append(f"cannot write to {where} ({error.strerror})")
    return problems


def unanswered(marks: Sequence[Marked], rank: int) -> list[str]:
    """The driver's part for a rank without a problem: the folders where its answer is missing."""
    return [
        f"writes to {mark.folder.what}, {mark.folder.path}, what the driver does not see"
        for mark in marks
        if not _appears(Path(mark.place) / _answer_name(rank), mark.word)
    ]


def _answer_name(rank: int) -> str:
    return f"rank-{rank}"


def _appears(path: Path, word: str) -> bool:
    """Whether the file has that content within _PATIENCE_SECONDS."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if path.read_text(encoding="utf-8") == word:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
