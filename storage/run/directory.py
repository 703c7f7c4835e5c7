"""The run directory: the files of one job.

    run.json                        the manifest: config, fingerprints, versions
    lock-NONCE.json                 the present owner (`storage.run.lock`)
    tokens.arrow                    calibration tokens
    choices/block-007.json          settings chosen during the job
    activations/block-007/          the inputs of block 7: activation shards and record.json
    targets/block-007/              the same of the dense model's own chain, with --reconstruct
    scratch.json                    the name of the job's folders on the nodes' scratch
    checkpoints/block-007/          block 7 pruned: row slices and record.json; before that, with
                                    --reconstruct, solved.json, which names the solved row slices
    uploads/                        what was sent to an output in an object store
    report/                         metrics and the report, for the user
    status.json                     the present phase, for `prox24 status`; the job never reads it
    prox24-scratch-*/               temporary folders of an owner, as for measuring the perplexity
    layers/NAME.safetensors         layers that --save-layers named

A file under activations/, targets/ or checkpoints/ counts only if the record.json (or solved.json)
beside it names it; all others are left from attempts that were not committed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from storage.errors import CorruptFileError, RunDirectoryError
from storage.files.checked_json import MAX_JSON_BYTES, decode_json
from storage.files.commit import fsync_directory, open_regular_file
from storage.files.listing import delete_folder, files_below, listed
from storage.files.os_errors import is_damage
from storage.files.temporary import is_temporary

logger = logging.getLogger(__name__)

BLOCK_SCHEMA = 2
"""The schema number of a block's record."""
RECORD_NAME = "record.json"
SOLVED_NAME = "solved.json"
"""Names the row slices of a block that is solved, but not yet reconstructed."""
SCRATCH_PREFIX = "prox24-scratch-"
"""Begins the names of an owner's temporary folders, which the next owner deletes."""

# Areas of activation shards: the inputs of the pruned model's blocks, and those of the dense one's.
_INPUTS, _TARGETS = "activations", "targets"
_BLOCK = re.compile(r"block-(\d{3,9})")
_ABSENT = object()
_SHOWN_CHARACTERS = 80


class RunDirectory:
    """The paths in a run directory, and deletions from it. The constructor touches no file.

    area: the folder of the activations that this object speaks of; see `targets`.
    """

    def __init__(self, path: Path, area: str = _INPUTS) -> None:
        self.path, self.area = path, area

    def targets(self) -> RunDirectory:
        """The same directory, whose activations are those of the dense model's own chain."""
        return RunDirectory(self.path, _TARGETS)

    def chain(self, dense: bool) -> RunDirectory:
        """The same directory with the activations of the dense or the pruned model."""
        return self.targets() if dense else RunDirectory(self.path)

    @property
    def manifest(self) -> Path:
        """run.json."""
        return self.path / "run.json"

    def tokens(self) -> Path:
        """The calibration tokens' file."""
        return self.path / "tokens.arrow"

    def activations(self, block: int) -> Path:
        """Directory of the inputs of `block`."""
        return self.path / self.area / f"block-{block:03d}"

    def activation_record(self, block: int) -> Path:
        """The record that commits the inputs of `block`."""
        return self.activations(block) / RECORD_NAME

    def checkpoints(self, block: int) -> Path:
        """Directory of the row slices of `block`."""
        return self.path / "checkpoints" / f"block-{block:03d}"

    def record(self, block: int) -> Path:
        """The record that commits the pruned `block`."""
        return self.checkpoints(block) / RECORD_NAME

    def solved(self, block: int) -> Path:
        """The record of a block's solved row slices, until the block is reconstructed."""
        return self.checkpoints(block) / SOLVED_NAME

    def choices(self, block: int) -> Path:
        """The file with the settings chosen at run time for `block`."""
        return self.path / "choices" / f"block-{block:03d}.json"

    def scratch(self) -> Path:
        """The file with the name of this job's folders on the nodes' scratch."""
        return self.path / "scratch.json"

    def uploads(self) -> Path:
        """Directory of records of uploads to an object store (`storage.output.uploads`)."""
        return self.path / "uploads"

    def report(self) -> Path:
        """Directory of the job's metrics and report."""
        return self.path / "report"

    def evaluation(self) -> Path:
        """The file with the finished model's perplexity, if it was measured."""
        return self.report() / "evaluation.json"

    def contained(self, path: Path) -> Path:
        """`path`, resolved; RunDirectoryError if it lies or leads outside the directory."""
        resolved = (self.path / path).resolve()
        if not resolved.is_relative_to(self.path.resolve()):
            raise RunDirectoryError(
                f"{path}: outside the run directory {self.path}; put itself there, not a link"
            )
        return resolved

    def committed_blocks(self) -> list[int]:
        """Blocks that have a record, ascending."""
        return self._blocks_with_record("checkpoints")

    def committed_activations(self) -> list[int]:
        """Blocks whose inputs are committed, ascending."""
        return self._blocks_with_record(self.area)

    def blocks_begun(self) -> int:
        """Number of blocks that must have been committed, judging by the records that exist.

        Blocks are committed in order, and a block's inputs after the block before it. So if a block
        below this number has no record, the record was lost.
        """
        past = [block + 1 for block in self.committed_blocks()]
        return max([0, *past, *self.committed_activations()])

    def size(self) -> int:
        """Bytes of all files in the directory; files that are deleted meanwhile do not count."""
        total = 0
        for path in files_below(self.path):
            with contextlib.suppress(FileNotFoundError):
                total += path.lstat().st_size
        return total

    def remove_activations(self, block: int, guard: Callable[[], None] | None = None) -> None:
        """Delete the inputs of `block`: the record first, so that no record names missing files.

        `guard` (the lock's `assert_held`) runs first, if there is anything to delete.
        """
        self._remove(self.activations(block), guard)

    def remove_all_activations(self, guard: Callable[[], None] | None = None) -> None:
        """Delete the inputs and the targets of all blocks. `guard` as in `remove_activations`."""
        for area in (_INPUTS, _TARGETS):
            for directory in reversed(self._block_directories(area)):
                self._remove(directory, guard)

    def remove_checkpoint(self, block: int, guard: Callable[[], None] | None = None) -> None:
        """Delete the record of `block`, then its row slices; for a job whose output is complete.

        `guard` as in `remove_activations`.
        """
        self._remove(self.checkpoints(block), guard)

    def remove_solved(self, block: int, guard: Callable[[], None] | None = None) -> None:
        """Delete the record of a committed `block`'s solved row slices, and what only it names.

        `guard` as in `remove_activations`.
        """
        names = _named_files(self.record(block))
        if not self.solved(block).exists() or not names:
            return
        if guard is not None:
            guard()
        for path in self.checkpoints(block).iterdir():
            if path.name not in names:
                path.unlink(missing_ok=True)

    def _remove(self, directory: Path, guard: Callable[[], None] | None) -> None:
        if directory.is_dir():
            self.contained(directory)
            if guard is not None:
                guard()
            removed = [_removed(directory / name) for name in (RECORD_NAME, SOLVED_NAME)]
            if any(removed):
                fsync_directory(directory)
            delete_folder(directory)

    def sweep_uncommitted(self, guard: Callable[[], None] | None = None) -> list[Path]:
        """Delete files that no record names, and return them; for the lock's owner only.

        These are temporary files, temporary folders, and files under activations/ and checkpoints/
        that the record beside them does not name. If a record is damaged or lost, its files are
        kept: they show whether the block, solved again, has the same bytes. `guard` (the lock's
        `assert_held`) runs after the files are listed and before any is deleted; as no name is used
        twice, an owner that is displaced meanwhile deletes nothing of its successor's. Raises
        RunDirectoryError if a link leads out of the directory.
        """
        for path in self.path.iterdir():
            self.contained(path)
        doomed = [path for path in files_below(self.path) if is_temporary(path)]
        doomed += listed(self.path, f"{SCRATCH_PREFIX}*")
        begun = self.blocks_begun()
        for area in (_INPUTS, _TARGETS, "checkpoints"):
            for directory in self._block_directories(area):
                self.contained(directory)
                names = _named_beside(directory)
                lost = area == "checkpoints" and int(directory.name.removeprefix("block-")) < begun
                if names is None or (not names and lost):
                    continue
                doomed += [path for path in directory.iterdir() if path.name not in names]
        if guard is not None:
            guard()
        for path in doomed:
            logger.debug("deleting %s, which no record names", path)
            if path.is_dir() and not path.is_symlink():
                delete_folder(path)
            else:
                path.unlink(missing_ok=True)
        return doomed

    def sweep_attempts(self, stamp: str) -> None:
        """Delete files of this owner's attempts, with `stamp` in their names, that no record names.

        For an owner that was displaced: it can no longer commit them, and no one else uses `stamp`.
        """
        for area in (_INPUTS, _TARGETS, "checkpoints"):
            for directory in self._block_directories(area):
                self.contained(directory)
                attempts = [path for path in directory.iterdir() if f".{stamp}-" in path.name]
                names = _named_beside(directory)
                for path in attempts:
                    if names is not None and path.name not in names:
                        path.unlink(missing_ok=True)

    def _block_directories(self, area: str) -> list[Path]:
        root = self.path / area
        if not root.is_dir() or root.is_symlink():
            return []
        return [path for path in sorted(root.iterdir()) if _BLOCK.fullmatch(path.name)]

    def _blocks_with_record(self, area: str) -> list[int]:
        directories = self._block_directories(area)
        names = [path.name for path in directories if (path / RECORD_NAME).exists()]
        return sorted(int(name.removeprefix("block-")) for name in names)


def _removed(record: Path) -> bool:
    """Deletes a record; whether it was there."""
    try:
        record.unlink()
    except FileNotFoundError:
        return False
    return True


def _named_beside(directory: Path) -> set[str] | None:
    """The names that the records in `directory` protect; None if one of them cannot be read.

    A block's own record makes the one of its solved row slices, and these, superfluous.
    """
    names = _named_files(directory / RECORD_NAME)
    return _named_files(directory / SOLVED_NAME) if names == set() else names


def _named_files(record: Path) -> set[str] | None:
    """The names of a record and of the files that it lists under "files" or "shards".

    Empty if there is no record, None if it cannot be read.
    """
    if not record.exists():
        return set()
    try:
        with open_regular_file(record) as file:
            raw = file.read(min(os.fstat(file.fileno()).st_size, MAX_JSON_BYTES))
        # Any schema version: files of another prox24 must not be deleted.
        data = decode_json(raw, record, json.loads(raw).get("schema_version"))
        entries = [*data.get("files", []), *data.get("shards", [])]
        return {record.name, *(str(entry["name"]) for entry in entries)}
    except OSError as error:
        if not is_damage(error):
            raise
        return None
    except (
        CorruptFileError,
        ValueError,
        RecursionError,
        LookupError,
        TypeError,
        AttributeError,
    ):
        return None


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences of a manifest (`old`) and a job (`new`), one line each, sorted by key.

    Nested keys are joined by dots: "solver.damping: 0.01 there, 0.1 here". Values are compared as
    JSON (a tuple equals a list); long ones are cut in the text.
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
