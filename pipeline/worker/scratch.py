"""Activations on node-local scratch: what a rank does there, and what the driver asks of the ranks.

`--scratch-dir` names a folder of each node. A job's own folder in it, `prox24-run-TOKEN`, is laid
out like a run directory and holds activation shards alone; the records that name them are in the
run directory. The token is in the run directory's `scratch.json` as long as the job needs scratch:
a folder whose token is nowhere is left from a job that ended or was given up, and is deleted.

A rank sees its own node's scratch only. A shard that its rank does not see (the node, or its
scratch, is gone, or the rank is on another node than before) is made again from the tokens, like
one that is damaged (`pipeline.loop.repair`). So which rank has which sequences never depends on
nodes, and neither does any byte of the result.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.records.schemas import SCRATCH_SCHEMA
from pipeline.records.scratch import FOLDER_PREFIX, TOKEN_BYTES, FreeScratch, read_token
from storage.errors import InputError, ResourceError
from storage.files.commit import make_directory, read_json, replace_json
from storage.files.damage import damage
from storage.files.hashing import StoredFile
from storage.run.directory import RunDirectory

_PLACE = "place.json"


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
                place = {"place": secrets.token_hex(TOKEN_BYTES), "run_directory": str(run.path)}
                replace_json(self._place, {"schema_version": SCRATCH_SCHEMA, **place})
        except OSError as error:
            raise ResourceError(
                f"{path} on {platform.node()} cannot be used ({error.strerror}); choose another "
                "--scratch-dir, that is a writable folder on every node"
            ) from error

    def free(self) -> FreeScratch:
        """What is free, and what of this job is there already."""
        place = str(read_json(self._place, SCRATCH_SCHEMA)["place"])
        path = self.store.path
        free = float(shutil.disk_usage(path).free)
        return FreeScratch(place, platform.node(), str(path), free, float(self.store.size()))

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
        if path.name != f"{FOLDER_PREFIX}{read_token(run)}":
            shutil.rmtree(path, ignore_errors=True)
