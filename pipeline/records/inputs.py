"""The records of a block's inputs and of the choices made for its groups."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import CorruptFileError
from storage.files.commit import read_json
from storage.files.hashing import StoredFile

if TYPE_CHECKING:
    pass

ACTIVATIONS_SCHEMA = 1

CHOICES_SCHEMA = 1


def read_inputs(record: Path) -> list[StoredFile]:
    """The activation shards that a record of a block's inputs names, by number.

    Raises `CorruptFileError` where it is missing or damaged.
    """
    shards = read_json(record, ACTIVATIONS_SCHEMA).get("shards")
    if not isinstance(shards, list):
        raise CorruptFileError(f"{record}: names no activation shards")
    return [StoredFile.from_json(entry, str(record)) for entry in shards]
