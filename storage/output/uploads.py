"""An output in an object store: which of its objects are written, so that none is sent twice.

A store has no rename: an output is whole when its `prox24.json`, written last, exists. What was
sent is recorded in the run directory, `uploads/NAME.json`: what the object was made from, its hash,
and its state in the store (size, ETag, time). An object whose state is another one is sent again.

A driver or worker that was frozen can complete an upload after its successor took over. It asks for
the run's lock just before, and the store's objects are compared with the records before
`prox24.json` is written; between those two questions and the answers a store offers no more. The
hashes in `prox24.json` tell.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from storage.errors import CorruptFileError, OutputError
from storage.files.commit import fsync_directory, read_json, replace_json
from storage.files.hashing import HashingStream, StoredFile
from storage.object_store import ObjectFolder

UPLOADS_SCHEMA = 1
PROBE = ".prox24-check"

Guard = Callable[[], None] | None


class Uploads:
    """The objects of one output, and what the run directory knows of them.

    folder: the run directory's `uploads`. destination: the output. guard: the lock's `assert_held`,
    asked before anything is changed for good.
    """

    def __init__(self, folder: Path, destination: ObjectFolder, guard: Guard) -> None:
        self.folder, self.destination, self._guard = folder, destination, guard

    def begun(self) -> bool:
        """Whether what is at the destination was begun by this run."""
        try:
            said = read_json(self.folder / "begun", UPLOADS_SCHEMA)
        except CorruptFileError:
            return False
        return bool(said.get("output") == str(self.destination))

    def begin(self, last: str) -> None:
        """Make the destination this run's: `last`, which makes an output whole, goes first.

        Then goes whatever this run has not written.
        """
        self._ask()
        self.destination.delete(last)
        if not self.begun():
            shutil.rmtree(self.folder, ignore_errors=True)
            payload = {"schema_version": UPLOADS_SCHEMA, "output": str(self.destination)}
            replace_json(self.folder / "begun", payload, guard=self._guard)
        for name in self.destination.files():
            if not self._record(name).exists():
                self._ask()
                self.destination.delete(name)

    def stored(self, name: str, made_from: str) -> StoredFile | None:
        """The object if it is there as it was sent, and made from the same; else None."""
        said = self._unchanged(name)
        if said is None or said.get("made_from") != made_from:
            return None
        return StoredFile(name, str(said["sha256"]), int(said["bytes"]))

    def send(
        self, name: str, made_from: str, write: Callable[[HashingStream], object]
    ) -> StoredFile:
        """Send an object, unless it is there already; `write` passes its bytes on.

        Raises ResourceError if the store does not take it.
        """
        found = self.stored(name, made_from)
        if found is not None:
            return found
        with self.destination.upload(name) as writer:
            write(writer)
            self._ask()
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
        """Raise OutputError unless all these objects are as they were sent."""
        for name in names:
            if self._unchanged(name) is None:
                raise OutputError(
                    f"{self.destination / name}: not as it was written, someone else writes there; "
                    "choose another OUTPUT, or run the same command again"
                )

    def finish(self) -> None:
        """Forget the records, when the output is whole."""
        if self.folder.is_dir():
            self._ask()
            shutil.rmtree(self.folder, ignore_errors=True)
            fsync_directory(self.folder.parent)

    def _unchanged(self, name: str) -> dict[str, Any] | None:
        """What the record of an object says, if the object's state is still the recorded one."""
        if not self._record(name).exists():
            return None
        try:
            said = read_json(self._record(name), UPLOADS_SCHEMA)
        except CorruptFileError:
            return None
        state = self.destination.state(name)
        return said if state is not None and said.get("state") == list(state) else None

    def _ask(self) -> None:
        if self._guard is not None:
            self._guard()

    def _record(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.json"


def require_writable(destination: ObjectFolder) -> None:
    """Raise ResourceError if an object cannot be written there and deleted again."""
    with destination.upload(PROBE) as writer:
        writer.write(b"prox24 can write here")
    destination.delete(PROBE)
