"""Whether every node sees the folders that a job needs: asked with marker files, not assumed.

The driver makes a new folder inside each, with a marker in it; every rank reads the marker and
leaves an answer, which the driver reads. So each has seen what the other wrote: a folder that only
has the same name on every node does not pass.
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

# How long a network filesystem may take to show on one node what another has just written.
_PATIENCE_SECONDS = 3.0
_LOOK_SECONDS = 0.1
_MARKER = "driver"
_DIGITS = 12


@dataclass(frozen=True)
class SharedFolder:
    """A folder that all nodes must see as one.

    `what` names it for people, with its option. `prefix` begins the names of what is made in it for
    a moment: one that a sweep recognizes after a kill.
    """

    what: str
    path: str
    prefix: str


@dataclass(frozen=True)
class Marked:
    """A folder with a marker: the marker lies in `place` and says `word`."""

    folder: SharedFolder
    place: str
    word: str


@contextlib.contextmanager
def marked(folders: Sequence[SharedFolder]) -> Iterator[tuple[Marked, ...]]:
    """The driver's part: a marker in every folder, gone in the end.

    Raises `OutputError` for a folder that it cannot write to itself.
    """
    made: list[Marked] = []
    try:
        for folder in folders:
            # Never a name that a node has looked for before: it may remember that it was not there.
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
    """A rank's part: reads each marker and leaves its answer; what is wrong, in words.

    Each begins with a verb whose subject is the node: "does not see the run directory, ...".
    """
    complaints = []
    for mark in marks:
        where = f"{mark.folder.what}, {mark.folder.path}"
        place = Path(mark.place)
        if not _appears(place / _MARKER, mark.word):
            complaints.append(f"does not see what the driver writes to {where}")
            continue
        try:
            (place / _answer_name(rank)).write_text(mark.word, encoding="utf-8")
        except OSError as error:
            complaints.append(f"cannot write to {where} ({error.strerror})")
    return complaints


def unanswered(marks: Sequence[Marked], rank: int) -> list[str]:
    """The driver's part for a rank that had no complaint: what of its answers does not arrive."""
    return [
        f"writes to {mark.folder.what}, {mark.folder.path}, what the driver does not see"
        for mark in marks
        if not _appears(Path(mark.place) / _answer_name(rank), mark.word)
    ]


def _answer_name(rank: int) -> str:
    return f"rank-{rank}"


def _appears(path: Path, word: str) -> bool:
    """Whether the file has that content, now or a little later."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if path.read_text(encoding="utf-8") == word:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
