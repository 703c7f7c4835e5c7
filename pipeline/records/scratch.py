"""What a run directory records about scratch on the nodes (`--scratch-dir`): the name of the job's
folder there, and the workers that wrote to it."""

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
    """The scratch that a rank sees.

    place: an id, the same for all ranks of a node. host, folder: for messages. free: bytes. held:
    bytes that this job's files take.
    """

    place: str
    host: str
    folder: str
    free: float
    held: float


def scratch_folder(
    run: RunDirectory, scratch_dir: str | None, guard: Callable[[], None]
) -> str | None:
    """The job's scratch folder, the same after a resume; None without --scratch-dir.

    `~` and environment variables in it are left for each node to expand. guard: the lock's
    `assert_held`.
    """
    if scratch_dir is None:
        return None
    token = read_token(run)
    if token is None:
        token = secrets.token_hex(TOKEN_BYTES)
        payload = {"schema_version": SCRATCH_SCHEMA, "token": token}
        replace_json(run.scratch(), payload, guard=guard)
    return os.path.join(scratch_dir, f"{FOLDER_PREFIX}{token}")


def kept_names(run: RunDirectory) -> dict[str, list[str]]:
    """Folder → the activation shards that its record names; unreadable records are left out.

    A folder is a path in the run directory, and in the job's folder on scratch.
    """
    kept: dict[str, list[str]] = {}
    for chain in (run, run.targets()):
        for block in chain.committed_activations():
            folder = chain.activations(block).relative_to(run.path).as_posix()
            with contextlib.suppress(InputError):
                kept[folder] = [file.name for file in read_inputs(chain.activation_record(block))]
    return kept


def written_by(run: RunDirectory) -> tuple[tuple[str, str], ...]:
    """By rank, the node that wrote the newest activations: (Ray's node id, its address).

    "" stands for what the record lacks; () if no record can be read.
    """
    for block in reversed(run.committed_activations()):
        with contextlib.suppress(InputError):
            record = read_json(run.activation_record(block), ACTIVATIONS_SCHEMA)
            workers = record.get("workers")
            if isinstance(workers, list) and all(isinstance(each, dict) for each in workers):
                return tuple(
                    (_text(each.get("node")), _text(each.get("node_address"))) for each in workers
                )
    return ()


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def read_token(run: RunDirectory) -> str | None:
    """The token in the name of the job's scratch folders; None if the job has none."""
    with contextlib.suppress(InputError):
        token = read_json(run.scratch(), SCRATCH_SCHEMA).get("token")
        if isinstance(token, str) and token.isalnum():
            return token
    return None
