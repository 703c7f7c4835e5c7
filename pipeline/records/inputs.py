"""The records of a block's inputs, and of the choices made for its groups of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.records.schemas import ACTIVATIONS_SCHEMA, CHOICES_SCHEMA
from pipeline.records.times import PhaseTimes
from storage.errors import CorruptFileError
from storage.files.commit import publish_json, read_json, replace_json
from storage.files.hashing import StoredFile
from storage.run.directory import RunDirectory


def read_inputs(record: Path) -> list[StoredFile]:
    """The activation shards that the record of a block's inputs names, by number.

    Raises `CorruptFileError` if it is missing or damaged.
    """
    shards = read_json(record, ACTIVATIONS_SCHEMA).get("shards")
    if not isinstance(shards, list):
        raise CorruptFileError(f"{record}: names no activation shards")
    return [StoredFile.from_json(entry, str(record)) for entry in shards]


def commit_inputs(
    run: RunDirectory,
    block: int,
    shards: Sequence[StoredFile],
    workers: list[dict[str, Any]],
    times: Mapping[str, PhaseTimes] | None,
    guard: Callable[[], None],
) -> None:
    """Publishes the record of the inputs of `block`: its shards, the workers, and the times.

    times: None where they are in the record of a block. guard: the lock's `assert_held`.
    """
    payload = {
        "schema_version": ACTIVATIONS_SCHEMA,
        "block": block,
        "shards": [shard.to_json() for shard in shards],
        "workers": workers,
        "phases": {name: phase_times.to_json() for name, phase_times in (times or {}).items()},
    }
    if times is not None:
        _copy_times(run, block, payload, guard)
    publish_json(run.activation_record(block), payload, guard=guard)


def _copy_times(
    run: RunDirectory, block: int, payload: dict[str, Any], guard: Callable[[], None]
) -> None:
    # This record is deleted with its shards, before the report needs the times: so a copy. It is
    # written before the commit, because a kill between the two would lose it.
    replace_json(run.report() / f"inputs-{block:03d}.json", payload, guard=guard)


def replace_shards(
    run: RunDirectory,
    block: int,
    replaced: Mapping[int, StoredFile],
    workers: list[dict[str, Any]],
    guard: Callable[[], None],
) -> None:
    """Changes the record of the inputs of `block`: number of a shard → the file it now names.

    workers: the processes that run the ranks now. guard: the lock's `assert_held`.
    """
    path = run.activation_record(block)
    payload = read_json(path, ACTIVATIONS_SCHEMA)
    for index, file in replaced.items():
        payload["shards"][index] = file.to_json()
    # Every rank now has its shards on the scratch of its present node.
    payload["workers"] = workers
    replace_json(path, payload, guard=guard)


def read_choices(path: Path) -> Any:
    """Group → the settings chosen for it. Raises `CorruptFileError` if the file is damaged."""
    return read_json(path, CHOICES_SCHEMA)["groups"]


def write_choices(
    path: Path, block: int, groups: Mapping[str, Any], guard: Callable[[], None]
) -> None:
    """Writes the settings chosen for each group of a block. guard: the lock's `assert_held`."""
    payload = {"schema_version": CHOICES_SCHEMA, "block": block, "groups": groups}
    replace_json(path, payload, guard=guard)
