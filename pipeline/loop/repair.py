"""Repairs damaged files of a run directory: recomputes them from the files that are intact.

Damage is found by size or hash and reported in a note; as little as possible is recomputed:

activation shard      its tokens are run through the committed blocks again; equal bytes replace the
                      damaged file
target                the dense model's chain is run again from the tokens
row slice             its block is pruned again, from recomputed inputs; equal bytes replace it
solved row slice      its block, which is not committed yet, is solved again
a block's record      its block is solved again and compared with the row slices that are there
choices               copied from the block's record; if that is not committed yet, chosen again by
                      the same rule
tokens                cut from the text again, if that gives the same bytes
run.json              written again by the driver that has read it; a new driver cannot
an inputs' record     the block's inputs are recomputed

Workers of the same kind, however many, give equal bytes. If the bytes differ, the redone block's
record replaces the old one and says so. Later blocks are kept, although their calibration inputs
differed in the last digits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.loop.block_steps import BlockSteps
from pipeline.loop.rank import Rank, call
from pipeline.messages import Outcome
from pipeline.records.inputs import read_choices, read_inputs, replace_shards, write_choices
from pipeline.records.schemas import MANIFEST_SCHEMA
from storage.errors import CorruptFileError
from storage.files.commit import read_json, replace_by, replace_json, sha256_file
from storage.files.damage import damage
from storage.files.hashing import StoredFile
from storage.run.checkpoints import BlockRecord
from storage.run.directory import RECORD_NAME


class Repairs:
    """Checks and repairs a run directory, between the phases of its job.

    begun: blocks below this number have been committed. manifest: the content of `run.json`, if
    known. mend_tokens: restores the tokens' file if it is damaged, and returns whether it was.
    failures: the errors of earlier attempts; a block that is solved again records them.
    """

    def __init__(
        self,
        steps: BlockSteps,
        begun: int,
        manifest: dict[str, Any] | None,
        mend_tokens: Callable[[], bool] | None,
        failures: Sequence[str],
    ) -> None:
        self.steps, self.run, self.begun, self.manifest = steps, steps.run, begun, manifest
        self._mend_tokens, self._failures = mend_tokens, failures
        self._guard = steps.lock.assert_held
        self._damaged_files = 0

    def mend(self, *, hashed: bool) -> bool:
        """Repairs all damaged files; returns whether there were any.

        hashed: read all files and compare hashes; otherwise only records and sizes. Blocks are
        repaired in order, because a block is recomputed from the blocks before it.
        """
        self._manifest()
        if hashed and self._mend_tokens is not None and self._mend_tokens():
            self._damaged_files += 1
        for block in range(self.steps.blocks + 1):
            if self.run.activation_record(block).exists():
                self._inputs(block, hashed)
            if self.run.targets().activation_record(block).exists():
                self._targets(block, hashed)
            if block < self.begun:
                self._block(block, hashed)
                continue
            if self.run.choices(block).exists():
                self._choices(block)
            if self.run.solved(block).exists():
                self._solved(block, hashed)
        return self._damaged_files > 0

    def mend_inputs(self) -> None:
        """Recomputes activation shards that are missing or not of the recorded size."""
        for block in self.run.committed_activations():
            self._inputs(block, False)
        for block in self.run.targets().committed_activations():
            self._targets(block, False)

    # -- checks, one kind of file each ------------------------------------------------------

    def _manifest(self) -> None:
        if self.manifest is None:
            return
        try:
            read_json(self.run.manifest, MANIFEST_SCHEMA)
        except CorruptFileError:
            self._note(self.run.manifest, _state(self.run.manifest), "it is written again")
            replace_json(self.run.manifest, self.manifest, guard=self._guard)

    def _inputs(self, block: int, hashed: bool) -> None:
        """The activation shards of one block's inputs, and the record that names them."""
        path = self.run.activation_record(block)
        try:
            shards = read_inputs(path)
        except CorruptFileError:
            self._note(path, _state(path), f"the inputs of block {block} are made again")
            self.run.remove_activations(block, self._guard)
            return
        bad = self._damaged_inputs(block, shards, hashed)
        if not bad:
            return
        needed = block == max(self.run.committed_activations())
        if not needed or 2 * len(bad) > len(shards):
            # An older store, or most of its shards: the loop recomputes it if it needs it.
            index, state = next(iter(bad.items()))
            remedy = f"the inputs of block {block} are made again"
            self._note(path.parent / shards[index].name, state, remedy)
            self.run.remove_activations(block, self._guard)
            return
        for index, state in bad.items():
            remedy = f"its sequences are run through {block} blocks again"
            self._note(path.parent / shards[index].name, state, remedy)
        self._replay(block, shards, sorted(bad))

    def _targets(self, block: int, hashed: bool) -> None:
        """The targets of the outputs of the block before this one; all are made again if one is."""
        run = self.run.targets()
        path = run.activation_record(block)
        try:
            shards = read_inputs(path)
            bad = self._damaged_inputs(block, shards, hashed, dense=True)
            if not bad:
                return
            index, state = next(iter(bad.items()))
            damaged = path.parent / shards[index].name
        except CorruptFileError:
            damaged, state = path, _state(path)
        self._note(damaged, state, f"the targets of block {block - 1} are made again")
        run.remove_activations(block, self._guard)

    def _solved(self, block: int, hashed: bool) -> None:
        """The solved row slices of a block that is not committed."""
        path = self.run.solved(block)
        try:
            files = self.steps.read_solved(block).files
            bad = _damaged(path.parent, files, hashed)
            if not bad:
                return
            index, state = next(iter(bad.items()))
            damaged = path.parent / files[index].name
        except CorruptFileError:
            damaged, state = path, _state(path)
        self._note(damaged, state, f"block {block} is solved again")
        path.unlink()

    def _damaged_inputs(
        self, block: int, shards: Sequence[StoredFile], hashed: bool, dense: bool = False
    ) -> dict[int, str]:
        """Number of each damaged activation shard → what is wrong; on scratch the ranks check."""
        if not self.steps.scratch:
            return _damaged(self.run.chain(dense).activations(block), shards, hashed)
        outcomes = self.steps.on_all(call(Rank.damaged_shards, block, list(shards), hashed, dense))
        return dict(sorted((i, s) for outcome in outcomes for i, s in outcome.value.items()))

    def _block(self, block: int, hashed: bool) -> None:
        """A committed block's record, choices and row slices."""
        path = self.run.record(block)
        try:
            record = self.steps.read_record(block)
        except CorruptFileError:
            self._note(path, _state(path), f"block {block} is solved again")
            self._choices(block)
            self._redo_unknown(block)
            return
        self._choices(block, record.results.get("choices"))
        bad = _damaged(path.parent, record.files, hashed)
        for index, state in bad.items():
            remedy = f"block {block} is solved again"
            self._note(path.parent / record.files[index].name, state, remedy)
        if bad:
            self._redo(block, record, [record.files[index] for index in bad])

    def _choices(self, block: int, recorded: object = None) -> None:
        """The choices of a block. `recorded`: those in its record, if it has one."""
        path = self.run.choices(block)
        try:
            groups = read_choices(path)
        except (CorruptFileError, KeyError):
            groups = None
        if isinstance(recorded, Mapping):
            if groups != recorded:
                self._note(path, _state(path), f"copied from the record of block {block}")
                write_choices(path, block, recorded, self._guard)
        elif groups is None and path.exists():
            self._note(path, _state(path), "chosen again, by the same rule from the same inputs")
            path.unlink()

    # -- repairs ----------------------------------------------------------------------------

    def _replay(self, block: int, shards: Sequence[StoredFile], only: Sequence[int]) -> None:
        """Recomputes the activation shards `only` of the inputs of `block`, from the tokens."""
        steps, stamp = self.steps, self.steps.stamp()
        steps.progress.phase("embed")
        made = _by_number(steps.on_all(call(Rank.embed, stamp, only)), only)
        for current in range(block):
            steps.progress.phase("propagate", current)
            phase = call(Rank.propagate, current, steps.pruned(current), made, stamp, only)
            written = _by_number(steps.on_all(phase), only)
            self._drop(current, made.values())
            made = written
        directory = self.run.activations(block)
        replaced = {}
        for index, file in made.items():
            if file.sha256 == shards[index].sha256 and not steps.scratch:
                replace_by(directory / file.name, directory / shards[index].name, self._guard)
            else:
                replaced[index] = file
        if replaced:
            replace_shards(self.run, block, replaced, steps.executor.workers(), self._guard)
        others = [i for i, file in replaced.items() if file.sha256 != shards[i].sha256]
        if others:
            steps.progress.note(
                f"{directory}: {len(others)} activation shards differ from the damaged ones in "
                "their last digits; the workers are of another kind"
            )
        self.run.sweep_uncommitted(self._guard)

    def _redo(self, block: int, record: BlockRecord, bad: Sequence[StoredFile]) -> None:
        """Restores the row slices `bad` of a block whose record is intact."""
        made = self._solve(block)
        directory = self.run.checkpoints(block)
        names = {file.sha256: file.name for file in made.files}
        if all(file.sha256 in names for file in bad):
            for file in bad:
                replace_by(directory / names[file.sha256], directory / file.name, self._guard)
            self.steps.progress.note(f"block {block}: restored, the same bytes as before")
        else:
            self._replace(block, made, f"{record.world} workers made it before")
        self.run.sweep_uncommitted(self._guard)

    def _redo_unknown(self, block: int) -> None:
        """Solves again a block whose record is lost, and compares it with its old row slices."""
        made = self._solve(block)
        directory = self.run.checkpoints(block)
        new = {file.name for file in made.files}
        old = {
            sha256_file(path)
            for path in directory.iterdir()
            if path.name not in new | {RECORD_NAME} and path.is_file()
        }
        if all(file.sha256 in old for file in made.files):
            replace_json(self.run.record(block), made.to_json(), guard=self._guard)
            self.steps.progress.note(f"block {block}: done again, the same bytes as before")
        else:
            self._replace(block, made, "its row slices are others, or gone")
        self.run.sweep_uncommitted(self._guard)

    def _replace(self, block: int, made: BlockRecord, why: str) -> None:
        """Replaces the block's record by one with other bytes than before; keeps later blocks."""
        later = max(self.begun - block - 1, 0)
        text = (
            f"block {block} was done again by {made.world} workers and may differ from what it was "
            f"in the last digits ({why}); {later} later blocks are kept as they are"
        )
        self.steps.progress.note(text)
        # Later inputs were computed with the block's earlier weights.
        for later_block in range(block + 1, self.steps.blocks + 1):
            self.run.remove_activations(later_block, self._guard)
            if later_block > block + 1 and self.steps.targets_follow_inputs:
                self.run.targets().remove_activations(later_block, self._guard)
        results = {**made.results, "repair": {"text": text, "later_blocks": later}}
        redone = dataclasses.replace(made, results=results)
        replace_json(self.run.record(block), redone.to_json(), guard=self._guard)

    def _solve(self, block: int) -> BlockRecord:
        """Solves the block again; its record is not committed.

        Recomputing its inputs needs room for two activation stores, and its targets for a third,
        beside those that the job is at, which are deleted if there is not enough.
        """
        stores = 2 if self.steps.reconstruction is None else 3
        for chain, first in ((self.run, block + 1), (self.run.targets(), block + 2)):
            for later in chain.committed_activations():
                if later < first:
                    continue
                with contextlib.suppress(CorruptFileError):
                    store = read_inputs(chain.activation_record(later))
                    needed = stores * sum(file.bytes for file in store)
                    # Free space on the nodes' scratch is not known here.
                    if self.steps.scratch or shutil.disk_usage(self.run.path).free < needed:
                        chain.remove_activations(later, self._guard)
        self.steps.sweep_scratch()
        return self.steps.prune(block, self._failures, commit_solved=False)

    def _drop(self, block: int, files: Iterable[StoredFile]) -> None:
        if self.steps.scratch:
            names = [file.name for file in files]
            self.steps.on_all(call(Rank.drop_shards, block, names))
            return
        directory = self.run.activations(block)
        for file in files:
            (directory / file.name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: it holds a store
            directory.rmdir()

    def _note(self, path: Path, state: str, remedy: str) -> None:
        self._damaged_files += 1
        self.steps.progress.note(f"{path}: {state}; {remedy}")


def _damaged(directory: Path, files: Sequence[StoredFile], hashed: bool) -> dict[int, str]:
    """Number of each damaged file → what is wrong with it."""
    states = {
        index: damage(directory / file.name, file, hashed=hashed)
        for index, file in enumerate(files)
    }
    return {index: state for index, state in states.items() if state is not None}


def _by_number(
    outcomes: Sequence[Outcome[list[StoredFile]]], only: Sequence[int]
) -> dict[int, StoredFile]:
    """All ranks' activation shards by number: ranks have contiguous shares, in rank order."""
    files = [file for outcome in outcomes for file in outcome.value]
    return dict(zip(only, files, strict=True))


def _state(path: Path) -> str:
    if not path.exists():
        return "missing"
    return "damaged" if path.stat().st_size else "empty"
