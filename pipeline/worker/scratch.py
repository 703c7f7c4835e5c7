"""Activation shards on the nodes' local disks (`--scratch-dir`).

`--scratch-dir` names a folder on each node. In it every job has a folder, `prox24-run-TOKEN`, which
is laid out like a run directory and holds only activation shards; the records that name them are in
the run directory. The run directory's `scratch.json` has the token while the job needs scratch. A
folder whose token is in no run directory is left from a job that has ended, and is deleted.

A rank sees only the scratch of its node. If a shard is not there (the node or its disk is lost, or
the rank has moved to another node) it is recomputed from the tokens, like a damaged one
(`pipeline.loop.repair`). So neither the division of sequences over ranks nor any byte of the result
depends on nodes.
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
from storage.files.listing import delete_folder, listed
from storage.run.directory import RunDirectory

_PLACE = "place.json"


class Scratch:
    """A job's scratch folder on this node."""

    def __init__(self, folder: str, run: RunDirectory) -> None:
        """Creates the folder, and deletes the folders of jobs that no longer need theirs.

        Raises `ResourceError` if it cannot be created.
        """
        path = Path(os.path.expandvars(folder)).expanduser()
        if not path.is_absolute():
            raise ResourceError(f"--scratch-dir {path.parent} is not an absolute path")
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
                f"{path} on {platform.node()} cannot be used ({error.strerror}); choose a "
                "--scratch-dir that is a writable folder on every node"
            ) from error

    def free(self) -> FreeScratch:
        """Bytes free, and bytes of this job's files."""
        place = str(read_json(self._place, SCRATCH_SCHEMA)["place"])
        path = self.store.path
        free = float(shutil.disk_usage(path).free)
        return FreeScratch(place, platform.node(), str(path), free, float(self.store.size()))

    def damaged(
        self, block: int, shards: Mapping[int, StoredFile], hashed: bool, dense: bool
    ) -> dict[int, str]:
        """The damaged ones of these activation shards: number → what is wrong.

        hashed: compare contents with the recorded hashes, not sizes alone. dense: they are targets.
        """
        folder = self.store.chain(dense).activations(block)
        states = {
            index: damage(folder / file.name, file, hashed=hashed) for index, file in shards.items()
        }
        missing = f"missing from the scratch of {platform.node()}"
        return {i: missing if s == "missing" else s for i, s in states.items() if s is not None}

    def drop(self, block: int, names: Sequence[str]) -> None:
        """Deletes activation shards by name."""
        for name in names:
            (self.store.activations(block) / name).unlink(missing_ok=True)

    def sweep(self, kept: Mapping[str, Sequence[str]]) -> None:
        """Deletes every activation shard that `kept`, folder → names, does not list."""
        keep = {self.store.path / folder / name for folder, names in kept.items() for name in names}
        for chain in (self.store, self.store.targets()):
            for folder in listed(self.store.path / chain.area, "block-*"):
                for path in listed(folder):
                    if path not in keep:
                        path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty, or another rank was faster
                    folder.rmdir()

    def clear(self) -> None:
        """Deletes the job's folder."""
        delete_folder(self.store.path)


def _sweep_others(job_folder: Path) -> None:
    """Deletes the folders beside `job_folder` whose job no longer needs them."""
    for path in listed(job_folder.parent, f"{FOLDER_PREFIX}*"):
        if path == job_folder or path.is_symlink():
            continue
        try:
            run = RunDirectory(Path(str(read_json(path / _PLACE, SCRATCH_SCHEMA)["run_directory"])))
            token = read_token(run)
        except (InputError, KeyError, OSError):
            # A folder that another job is just creating, not one of prox24's, or another user's.
            continue
        if path.name != f"{FOLDER_PREFIX}{token}":
            shutil.rmtree(path, ignore_errors=True)
