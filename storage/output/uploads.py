"""Uploads of an output to an object store, recorded so that a resumed job sends no object twice.

An object store has no rename: an output is complete when its `prox24.json`, written last, exists.
The run directory records each upload in `uploads/NAME.json`: what the object was made from, its
hash, and its state in the store (size, ETag, time). If the state has changed, it is sent again.

A driver or worker that was frozen may complete an upload after another has taken the run over. Two
checks make that unlikely: the lock is checked just before an upload is completed, and all objects
are compared with their records before `prox24.json` is written. Object stores offer no more; the
hashes in `prox24.json` reveal what remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from storage.errors import CorruptFileError, OutputError
from storage.files.commit import fsync_directory, read_json, replace_json
from storage.files.hashing import HashingStream, StoredFile
from storage.files.listing import delete_folder
from storage.object_store import ObjectFolder

UPLOADS_SCHEMA = 1
PROBE = ".prox24-check"

Guard = Callable[[], None] | None


class Uploads:
    """The objects of one output, and their records in the run directory.

    folder: the run directory's `uploads`. destination: the output. guard: the lock's `assert_held`,
    called before every change.
    """

    def __init__(self, folder: Path, destination: ObjectFolder, guard: Guard) -> None:
        self.folder, self.destination, self._guard = folder, destination, guard

    def begun(self) -> bool:
        """Whether this run began to write the objects at the destination."""
        try:
            begun = read_json(self.folder / "begun", UPLOADS_SCHEMA)
        except CorruptFileError:
            return False
        return bool(begun.get("output") == str(self.destination))

    def begin(self, last: str) -> None:
        """Delete all objects at the destination that this run has not written.

        The first is `last`, the object that marks an output as complete.
        """
        self._check_guard()
        self.destination.delete(last)
        if not self.begun():
            delete_folder(self.folder)
            payload = {"schema_version": UPLOADS_SCHEMA, "output": str(self.destination)}
            replace_json(self.folder / "begun", payload, guard=self._guard)
        for name in self.destination.files():
            if not self._record(name).exists():
                self._check_guard()
                self.destination.delete(name)

    def stored(self, name: str, made_from: str) -> StoredFile | None:
        """The object, if it is there unchanged and was made from `made_from`; else None."""
        record = self._unchanged(name)
        if record is None or record.get("made_from") != made_from:
            return None
        return StoredFile(name, str(record["sha256"]), int(record["bytes"]))

    def send(
        self, name: str, made_from: str, write: Callable[[HashingStream], object]
    ) -> StoredFile:
        """Send an object, unless it is there already. `write` writes its bytes.

        made_from: identifies the contents. Raises ResourceError if the store refuses the object.
        """
        stored = self.stored(name, made_from)
        if stored is not None:
            return stored
        with self.destination.upload(name) as writer:
            write(writer)
            self._check_guard()
        payload: dict[str, Any] = {
            "schema_version": UPLOADS_SCHEMA,
            "made_from": made_from,
            "sha256": writer.sha256,
            "bytes": writer.bytes,
            "state": list(self.destination.state(name) or ()),
        }
        replace_json(self._record(name), payload, guard=self._guard)
        return writer.stored(name)

    def check(self, names: Iterable[str]) -> None:
        """Raise OutputError unless all these objects are unchanged since they were sent."""
        for name in names:
            if self._unchanged(name) is None:
                raise OutputError(
                    f"{self.destination / name}: not as it was written, someone else writes there; "
                    "choose another OUTPUT, or run the same command again"
                )

    def finish(self) -> None:
        """Delete the records, when the output is complete."""
        if self.folder.is_dir():
            self._check_guard()
            delete_folder(self.folder)
            fsync_directory(self.folder.parent)

    def _unchanged(self, name: str) -> dict[str, Any] | None:
        """The record of an object, if the object's state is still the recorded one; else None."""
        if not self._record(name).exists():
            return None
        try:
            record = read_json(self._record(name), UPLOADS_SCHEMA)
        except CorruptFileError:
            return None
        state = self.destination.state(name)
        return record if state is not None and record.get("state") == list(state) else None

    def _check_guard(self) -> None:
        if self._guard is not None:
            self._guard()

    def _record(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.json"


def require_writable(destination: ObjectFolder) -> None:
    """Raise ResourceError if an object cannot be written to `destination` and deleted again."""
    with destination.upload(PROBE) as writer:
        writer.write(b"prox24 can write here")
    destination.delete(PROBE)
