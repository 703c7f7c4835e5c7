"""Activations on node-local scratch: what a rank does there, and what the driver asks of the ranks.

`--scratch-dir` names a folder of each node. A job's own folder in it, `prox24-run-TOKEN`, is laid
out like a run directory and holds activation shards alone; the records that name them are in the
run directory. The token is in the run directory's `scratch.json` as long as the job needs scratch:
a folder whose token is nowhere is left from a job that ended or was given up, and is deleted.

A rank sees its own node's scratch only. A shard that its rank does not see (the node, or its
scratch, is gone, or the rank is on another node than before) is made again from the tokens, like
one that is damaged (`pipeline.repair`). So which rank has which sequences never depends on nodes,
and neither does any byte of the result.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.repair import ACTIVATIONS_SCHEMA, read_inputs
from storage.commit import make_directory, read_json, replace_json
from storage.errors import InputError, ResourceError
from storage.hashing import StoredFile
from storage.mending import damage
from storage.run_directory import RunDirectory

SCRATCH_SCHEMA = 1
FOLDER_PREFIX = "prox24-run-"
_TOKEN_BYTES = 8
_PLACE = "place.json"
_SLACK_BYTES = 16 << 20


@dataclass(frozen=True)
class ScratchRoom:
    """A rank's scratch: which one it is, on which host, bytes free, and bytes of this job's there.

    Ranks on one node have the same `place`.
    """

    place: str
    host: str
    folder: str
    free: float
    held: float


# -- on the driver --------------------------------------------------------------------------


def scratch_folder(
    run: RunDirectory, scratch_dir: str | None, guard: Callable[[], None]
) -> str | None:
    """The job's own folder, on each node, if it has any; the same after the job is resumed.

    `~` and variables of the environment are each node's own.
    """
    if scratch_dir is None:
        return None
    token = _token(run)
    if token is None:
        token = secrets.token_hex(_TOKEN_BYTES)
        payload = {"schema_version": SCRATCH_SCHEMA, "token": token}
        replace_json(run.scratch(), payload, guard=guard)
    return os.path.join(scratch_dir, f"{FOLDER_PREFIX}{token}")


def check_scratch_room(rooms: Sequence[ScratchRoom], store: float) -> None:
    """Raises `ResourceError` where a node's scratch cannot hold its ranks' part of two stores.

    store: bytes of all activations of a block.
    """
    for place in {room.place for room in rooms}:
        own = [room for room in rooms if room.place == place]
        needed = 2 * store * len(own) / len(rooms) + _SLACK_BYTES
        if own[0].free + own[0].held < needed:
            raise ResourceError(
                f"{own[0].folder} on {own[0].host}: activations need about {needed / 1e9:.2f} GB, "
                f"{own[0].free / 1e9:.2f} GB are free; choose another --scratch-dir, or lower "
                "--nsamples or --seqlen"
            )


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


def _token(run: RunDirectory) -> str | None:
    with contextlib.suppress(InputError):
        token = read_json(run.scratch(), SCRATCH_SCHEMA).get("token")
        if isinstance(token, str) and token.isalnum():
            return token
    return None


# -- on a rank ------------------------------------------------------------------------------


class Scratch:
    """This node's scratch folder of a job."""

    def __init__(self, folder: str, run: RunDirectory) -> None:
        """Makes the folder, and deletes those of jobs that need theirs no more.

        Raises `ResourceError` where it cannot be made.
        """
        path = Path(os.path.expandvars(folder)).expanduser()
        if not path.is_absolute():
            raise ResourceError(f"--scratch-dir {path.parent} is no absolute path")
        self.store, self.run = RunDirectory(path), run
        try:
            make_directory(path)
            _sweep_others(path)
            self._place = path / _PLACE
            if not self._place.exists():
                place = {"place": secrets.token_hex(_TOKEN_BYTES), "run_directory": str(run.path)}
                replace_json(self._place, {"schema_version": SCRATCH_SCHEMA, **place})
        except OSError as error:
            raise ResourceError(
                f"{path} on {platform.node()} cannot be used ({error.strerror}); choose another "
                "--scratch-dir, that is a writable folder on every node"
            ) from error

    def room(self) -> ScratchRoom:
        """What is free, and what of this job is there already."""
        place = str(read_json(self._place, SCRATCH_SCHEMA)["place"])
        path = self.store.path
        free = float(shutil.disk_usage(path).free)
        return ScratchRoom(place, platform.node(), str(path), free, float(self.store.size()))

    def damaged(self, block: int, shards: Mapping[int, StoredFile], hashed: bool) -> dict[int, str]:
        """What is wrong with each of these activation shards that is not as its record says."""
        folder = self.store.activations(block)
        states = {
            index: damage(folder / file.name, file, hashed=hashed) for index, file in shards.items()
        }
        missing = f"missing from the scratch of {platform.node()}"
        return {i: missing if s == "missing" else s for i, s in states.items() if s is not None}

    def drop(self, block: int, names: Sequence[str]) -> None:
        """Deletes activation shards by name."""
        for name in names:
            (self.store.activations(block) / name).unlink(missing_ok=True)

    def sweep(self, kept: Mapping[int, Sequence[str]]) -> None:
        """Deletes every activation shard but those in `kept`."""
        root = self.store.path / "activations"
        keep = {
            self.store.activations(block) / name for block, names in kept.items() for name in names
        }
        for path in root.glob("block-*/*"):
            if path not in keep:
                path.unlink(missing_ok=True)
        for folder in root.glob("block-*"):
            with contextlib.suppress(OSError):  # not empty, or another rank was faster
                folder.rmdir()

    def clear(self) -> None:
        """Deletes the job's folder."""
        shutil.rmtree(self.store.path, ignore_errors=True)


def _sweep_others(own: Path) -> None:
    for path in own.parent.glob(f"{FOLDER_PREFIX}*"):
        if path == own or path.is_symlink():
            continue
        try:
            run = RunDirectory(Path(str(read_json(path / _PLACE, SCRATCH_SCHEMA)["run_directory"])))
        except (InputError, KeyError):
            continue  # another job's that is just being made, or none of ours
        if path.name != f"{FOLDER_PREFIX}{_token(run)}":
            shutil.rmtree(path, ignore_errors=True)
