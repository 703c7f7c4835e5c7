"""What a run directory says of the scratch on its nodes: its folder's name, and who wrote there."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.records.inputs import read_inputs
from pipeline.records.schemas import ACTIVATIONS_SCHEMA, SCRATCH_SCHEMA
from storage.errors import InputError
from storage.files.commit import read_json, replace_json
from storage.run.directory import RunDirectory

FOLDER_PREFIX = "prox24-run-"
TOKEN_BYTES = 8


@dataclass(frozen=True)
class FreeScratch:
    """A rank's scratch: which one it is, on which host, bytes free, and bytes of this job's there.

    Ranks on one node have the same `place`.
    """

    place: str
    host: str
    folder: str
    free: float
    held: float


def scratch_folder(
    run: RunDirectory, scratch_dir: str | None, guard: Callable[[], None]
) -> str | None:
    """The job's own folder, on each node, if it has any; the same after the job is resumed.

    `~` and variables of the environment are each node's own.
    """
    if scratch_dir is None:
        return None
    token = read_token(run)
    if token is None:
        token = secrets.token_hex(TOKEN_BYTES)
        payload = {"schema_version": SCRATCH_SCHEMA, "token": token}
        replace_json(run.scratch(), payload, guard=guard)
    return os.path.join(scratch_dir, f"{FOLDER_PREFIX}{token}")


def kept_names(run: RunDirectory) -> dict[int, list[str]]:
    """Block → names of the activation shards that records name; unreadable records name none."""
    kept: dict[int, list[str]] = {}
    for block in run.committed_activations():
        with contextlib.suppress(InputError):
            kept[block] = [file.name for file in read_inputs(run.activation_record(block))]
    return kept


def written_by(run: RunDirectory) -> tuple[tuple[str, str], ...]:
    """The node of each rank that wrote the newest activations, as Ray's id and address.

    "" stands for what the record does not say; empty where there is no record that can be read.
    """
    for block in reversed(run.committed_activations()):
        with contextlib.suppress(InputError):
            record = read_json(run.activation_record(block), ACTIVATIONS_SCHEMA)
            workers = record.get("workers")
            if isinstance(workers, list) and all(isinstance(own, dict) for own in workers):
                return tuple(
                    (_text(own.get("node")), _text(own.get("node_address"))) for own in workers
                )
    return ()


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def read_token(run: RunDirectory) -> str | None:
    """What tells the job's folders on scratch from others'; None where it has none."""
    with contextlib.suppress(InputError):
        token = read_json(run.scratch(), SCRATCH_SCHEMA).get("token")
        if isinstance(token, str) and token.isalnum():
            return token
    return None
