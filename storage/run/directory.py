"""Where everything of one job lies.

    run.json                        the manifest: config, fingerprints, versions
    lock-NONCE.json                 who works on it (`storage.run.lock`)
    tokens.arrow                    calibration tokens
    choices/block-007.json          settings chosen while the job runs
    activations/block-007/          the inputs of block 7: activation shards and record.json
    scratch.json                    whose activation shards are on the nodes' scratch
    checkpoints/block-007/          block 7 pruned: row slices and record.json
    uploads/                        objects of an output in an object store that were sent
    report/                         figures for the user
    status.json                     what is going on, for `prox24 status`; nothing relies on it
    prox24-scratch-*/               an owner's own, e.g. while it measures the perplexity
    layers/NAME.safetensors         what --save-layers asked for

A file under activations/ or checkpoints/ counts only if the record.json beside it names it; all
others are left from attempts that were not committed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from storage.errors import CorruptFileError, RunDirectoryError
from storage.files.checked_json import MAX_JSON_BYTES, decode_json
from storage.files.commit import fsync_directory, is_temporary, open_own

logger = logging.getLogger(__name__)

BLOCK_SCHEMA = 1  # of a block's record
RECORD_NAME = "record.json"
SCRATCH_PREFIX = "prox24-scratch-"
"""Begins the names of folders for one owner's use, which the next one deletes."""

_BLOCK = re.compile(r"block-(\d{3,9})")
_ABSENT = object()
_SHOWN_CHARACTERS = 80


class RunDirectory:
    """Paths of a run directory, and what may be deleted from it. Creating one touches nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def manifest(self) -> Path:
        """run.json."""
        return self.path / "run.json"

    def tokens(self) -> Path:
        """The calibration tokens' file."""
        return self.path / "tokens.arrow"

    def activations(self, block: int) -> Path:
        """Directory of the inputs of `block`."""
        return self.path / "activations" / f"block-{block:03d}"

    def activation_record(self, block: int) -> Path:
        """The record that commits the inputs of `block`."""
        return self.activations(block) / RECORD_NAME

    def checkpoints(self, block: int) -> Path:
        """Directory of the row slices of `block`."""
        return self.path / "checkpoints" / f"block-{block:03d}"

    def record(self, block: int) -> Path:
        """The record that commits the pruned `block`."""
        return self.checkpoints(block) / RECORD_NAME

    def choices(self, block: int) -> Path:
        """The file that commits what was chosen at run time for `block`."""
        return self.path / "choices" / f"block-{block:03d}.json"

    def scratch(self) -> Path:
        """The file that says which folders on the nodes' scratch are this job's."""
        return self.path / "scratch.json"

    def uploads(self) -> Path:
        """Directory of what was sent to an object store (`storage.output.uploads`)."""
        return self.path / "uploads"

    def report(self) -> Path:
        """Directory of the figures for the user."""
        return self.path / "report"

    def evaluation(self) -> Path:
        """The figures of the finished model's evaluation, where there was one."""
        return self.report() / "evaluation.json"

    def contained(self, path: Path) -> Path:
        """`path`, resolved; RunDirectoryError if it lies or leads outside the directory."""
        resolved = (self.path / path).resolve()
        if not resolved.is_relative_to(self.path.resolve()):
            raise RunDirectoryError(f"{path}: outside the run directory {self.path}")
        return resolved

    def committed_blocks(self) -> list[int]:
        """Blocks that have a record, ascending."""
        return self._blocks_with_record("checkpoints")

    def committed_activations(self) -> list[int]:
        """Blocks whose inputs are committed, ascending."""
        return self._blocks_with_record("activations")

    def blocks_begun(self) -> int:
        """How many blocks must have been committed, going by what is there.

        Blocks are committed in order, and a block's inputs after the block before it. So a block
        below this number that has no record had one, and lost it.
        """
        past = [block + 1 for block in self.committed_blocks()]
        return max([0, *past, *self.committed_activations()])

    def size(self) -> int:
        """Bytes of all files in the directory; files that vanish meanwhile count nothing."""
        total = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_size
                except FileNotFoundError:
                    continue
        return total

    def remove_activations(self, block: int, guard: Callable[[], None] | None = None) -> None:
        """Delete the inputs of `block`: the record first, so that no record names missing files.

        `guard` (the lock's `assert_held`) runs before, if there is anything to delete.
        """
        self._remove(self.activations(block), guard)

    def remove_checkpoint(self, block: int, guard: Callable[[], None] | None = None) -> None:
        """Delete the record of `block` and then its row slices; for a job whose output is whole.

        `guard` as in `remove_activations`.
        """
        self._remove(self.checkpoints(block), guard)

    def _remove(self, directory: Path, guard: Callable[[], None] | None) -> None:
        if directory.is_dir():
            self.contained(directory)
            if guard is not None:
                guard()
            record = directory / RECORD_NAME
            if record.exists():
                record.unlink()
                fsync_directory(directory)
            shutil.rmtree(directory, ignore_errors=True)

    def sweep_uncommitted(self, guard: Callable[[], None] | None = None) -> list[Path]:
        """Delete what no record names, and return it; for the holder of the lock only.

        That is: temporary files, scratch folders, and files under activations/ and checkpoints/
        that the record beside them does not name. No such name is ever used twice. Where a record
        cannot be read or was lost, the files are kept: they tell whether the block, done again, is
        what it was. `guard` (the lock's `assert_held`) runs after the files are listed and before
        any is deleted, so that an owner that was displaced meanwhile deletes nothing that its
        successor wrote. Raises RunDirectoryError if a link leads out of the directory.
        """
        for path in self.path.iterdir():
            self.contained(path)
        doomed = [path for path in self._files() if is_temporary(path)]
        doomed += self.path.glob(f"{SCRATCH_PREFIX}*")
        begun = self.blocks_begun()
        for area in ("activations", "checkpoints"):
            for directory in self._block_directories(area):
                self.contained(directory)
                names = _named_files(directory / RECORD_NAME)
                lost = area == "checkpoints" and int(directory.name.removeprefix("block-")) < begun
                if names is None or (not names and lost):
                    continue
                doomed += [path for path in directory.iterdir() if path.name not in names]
        if guard is not None:
            guard()
        for path in doomed:
            logger.debug("deleting %s, which no record names", path)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return doomed

    def sweep_attempts(self, stamp: str) -> None:
        """Delete files of this owner's attempts, with `stamp` in their names, that no record names.

        For an owner that was displaced: it can no longer commit them, and no one else uses `stamp`.
        """
        for area in ("activations", "checkpoints"):
            for directory in self._block_directories(area):
                self.contained(directory)
                attempts = [path for path in directory.iterdir() if f".{stamp}-" in path.name]
                names = _named_files(directory / RECORD_NAME)
                for path in attempts:
                    if names is not None and path.name not in names:
                        path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return [Path(folder, name) for folder, _, names in os.walk(self.path) for name in names]

    def _block_directories(self, area: str) -> list[Path]:
        root = self.path / area
        if not root.is_dir() or root.is_symlink():
            return []
        return [path for path in sorted(root.iterdir()) if _BLOCK.fullmatch(path.name)]

    def _blocks_with_record(self, area: str) -> list[int]:
        directories = self._block_directories(area)
        found = [path.name for path in directories if (path / RECORD_NAME).exists()]
        return sorted(int(name.removeprefix("block-")) for name in found)


def _named_files(record: Path) -> set[str] | None:
    """Names that a record of either kind gives under "files" or "shards", and its own.

    Empty if there is no record, None if it cannot be read.
    """
    if not record.exists():
        return set()
    try:
        with open_own(record) as file:
            raw = file.read(min(os.fstat(file.fileno()).st_size, MAX_JSON_BYTES))
        # Of any version: what another prox24 wrote is not ours to delete.
        data = decode_json(raw, record, json.loads(raw).get("schema_version"))
        entries = [*data.get("files", []), *data.get("shards", [])]
        return {RECORD_NAME, *(str(entry["name"]) for entry in entries)}
    except (
        CorruptFileError,
        OSError,
        ValueError,
        RecursionError,
        LookupError,
        TypeError,
        AttributeError,
    ):
        return None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between a manifest (`old`) and a job (`new`), one line each, sorted by key.

    Nested keys are joined by dots: "solver.damping: 0.01 there, 0.1 here". Values are compared as
    JSON holds them (a tuple equals a list), and long ones are cut.
    """
    left, right = _flatten(old), _flatten(new)
    return [
        f"{key}: {_shown(left.get(key, _ABSENT))} there, {_shown(right.get(key, _ABSENT))} here"
        for key in sorted(left.keys() | right.keys())
        if left.get(key, _ABSENT) != right.get(key, _ABSENT)
    ]


def _flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{name}.")
        else:
            flat[name] = json.loads(json.dumps(value))
    return flat


def _shown(value: object) -> str:
    if value is _ABSENT:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
