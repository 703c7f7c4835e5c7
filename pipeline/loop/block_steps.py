"""One attempt at a block: its inputs, its statistics, its solve, and its record.

The phases of a block: `calibrate` (dense forward, partial sums of statistics), `reduce` (sums over
all ranks), `choose` (for --shrinkage auto), `solve`, for --reconstruct `dense` and the training
(`pipeline.loop.reconstruction`), `propagate` (pruned forward, next inputs).
`advance` is `propagate` and the next block's `calibrate` in one pass over the activation shards.
Nothing here is retried: that is for `block_loop`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.config.reconstruct import Reconstruct
from pipeline.loop.executor import Executor
from pipeline.loop.rank import Call, Rank, call
from pipeline.loop.reconstruction import reconstruct
from pipeline.messages import Observed, Outcome, SolvedSlices
from pipeline.records.block import block_record, read_record
from pipeline.records.inputs import (
    commit_inputs,
    read_choices,
    read_inputs,
    write_choices,
)
from pipeline.records.scratch import kept_names
from pipeline.records.times import PhaseTimes, add_phase
from pipeline.runtime.progress import Progress
from pipeline.runtime.stopwatch import peak_memory
from storage.files.commit import publish_json
from storage.files.hashing import StoredFile
from storage.run.checkpoints import BlockRecord
from storage.run.directory import RunDirectory
from storage.run.lock import STAMP_DIGITS, RunLock

logger = logging.getLogger(__name__)

T = TypeVar("T")
Times = dict[str, PhaseTimes]
Choices = dict[str, dict[str, Any]]


@dataclass
class BlockSteps:
    """The steps of a block, run on an executor by the driver that holds `lock`.

    blocks_path: the name of the list of blocks in the model, for messages.
    layers: per block, the pruned layers' shapes, name → (R, C). dtypes: per block, their stored
    dtypes (safetensors names). Both are empty for an evaluation.
    calibrates: False for methods that need no statistics; then there are no activations.
    chooses: whether some settings are chosen per group before the solve (--shrinkage auto).
    hessian_memory: bytes of statistics that a rank may hold at once; a block that needs more takes
    its groups in several passes. None: the ranks' devices decide.
    scratch: whether activation shards are on the nodes' local disks, which only workers see.
    reconstruction: how solved blocks are reconstructed; None: they are not.
    attempts: number of attempts so far; part of the names of new files.
    """

    executor: Executor
    run: RunDirectory
    lock: RunLock
    progress: Progress
    blocks: int
    blocks_path: str = ""
    layers: Sequence[dict[str, tuple[int, int]]] = ()
    dtypes: Sequence[dict[str, str]] = ()
    calibrates: bool = True
    chooses: bool = False
    hessian_memory: float | None = None
    scratch: bool = False
    reconstruction: Reconstruct | None = None
    attempts: int = field(default=0, init=False)

    @property
    def keeps_inputs(self) -> bool:
        """Whether there are activations at all."""
        return self.calibrates or self.reconstruction is not None

    @property
    def targets_follow_inputs(self) -> bool:
        """Whether a reconstruction's targets depend on the pruned blocks before."""
        return self.reconstruction is not None and not self.reconstruction.dense_chain

    def prune(
        self, block: int, failures: Sequence[str], *, commit_solved: bool = True
    ) -> BlockRecord:
        """Prunes a block; returns its record, which the caller commits.

        With a reconstruction the solved block is committed first, as a resumed job then goes on
        from there. failures: the errors of earlier attempts, for the record. commit_solved: False
        for a block whose own record is there, which is done again.
        """
        if self.reconstruction is None or not self.layers[block]:
            return self.solve(block, failures)
        record = self._solved(block) if commit_solved else None
        if record is None:
            record = self.solve(block, failures)
            if commit_solved:
                publish_json(self.run.solved(block), record.to_json(), guard=self.lock.assert_held)
        return reconstruct(self, self.reconstruction, record, failures)

    def solve(self, block: int, failures: Sequence[str]) -> BlockRecord:
        """Solves a block's layers; returns the record of its solved row slices."""
        started = time.perf_counter()
        times: Times = {}
        groups: list[list[str]] = []
        choices: Choices | None = None
        solved: list[list[SolvedSlices]] = []  # by pass, then by rank
        if not self.layers[block]:
            logger.debug("block %d stays dense", block)
        elif not self.calibrates:
            solved.append(self._solve(block, None, times))
        else:
            shards, observed = self.inputs(block, observe=True)
            if observed is None:
                observed = self._calibrate(block, shards, 0, times)
            groups = [list(group.layers) for group in observed.groups]
            if self.reconstruction is not None:
                self.targets(block, times)  # now: the dense block is in memory
            for number in range(observed.passes):
                if number:
                    self._calibrate(block, shards, number, times)
                self._reduce(block, times)
                choices = self._choices(block, times) if self.chooses else None
                solved.append(self._solve(block, choices, times))
        results = {
            "groups": groups,
            "choices": choices,
            # By rank, the groups of all passes together.
            "costs": [
                {group: cost for part in parts for group, cost in part.costs.items()}
                for parts in zip(*solved, strict=True)
            ],
            "phases": {name: phase.to_json() for name, phase in times.items()},
            "seconds": time.perf_counter() - started,
            "driver_memory": peak_memory(),
            "workers": self.executor.workers(),
            "failures": list(failures),
        }
        return block_record(
            block,
            self.attempts,
            self.executor.world,
            {name: (shape, self.dtypes[block][name]) for name, shape in self.layers[block].items()},
            [part for parts in solved for part in parts],
            results,
        )

    def inputs(
        self, block: int, *, observe: bool = False
    ) -> tuple[list[StoredFile], Observed | None]:
        """The activation shards of the inputs of `block`, computed if they are missing.

        Starts from the nearest committed inputs at or below `block`, or else from the tokens; an
        older store is deleted as soon as the one made from it is committed.

        With `observe`, the last step (if one is needed) also runs the dense block on what it
        writes. Then the ranks have the statistics of the first pass, and what they observed is the
        second value; otherwise that is None.
        """
        observed: Observed | None = None
        below = self._nearest_inputs(block)
        if below is None:
            below = 0
            self._embed()
        for older in range(below):
            self.run.remove_activations(older, self.lock.assert_held)
        for current in range(below, block):
            if observe and current + 1 == block:
                observed = self._advance(current)
            else:
                self._propagate(current)
            self.run.remove_activations(current, self.lock.assert_held)
            self.sweep_scratch()
        return read_inputs(self.run.activation_record(block)), observed

    def targets(self, block: int, times: Times) -> list[StoredFile]:
        """The shards of the targets of `block`'s outputs, computed if they are missing.

        They are outputs of the dense model's own chain: its inputs of the block after this one. Or,
        as the reconstruction says, those of the dense block for the pruned model's inputs.
        """
        assert self.reconstruction is not None
        run, after = self.run.targets(), block + 1
        first = block
        if self.reconstruction.dense_chain:
            committed = set(run.committed_activations())
            while first > 0 and first not in committed:
                first -= 1
        if run.activation_record(after).exists():
            first = after
        for older in range(first):
            run.remove_activations(older, self.lock.assert_held)
        for current in range(first, after):
            self._dense(current, times)
            run.remove_activations(current, self.lock.assert_held)
            if current == 0 and block > 0:
                # The embedded tokens, from which a chain that was lost begins again.
                self.run.remove_activations(0, self.lock.assert_held)
            self.sweep_scratch()
        return read_inputs(run.activation_record(after))

    def sweep_scratch(self) -> None:
        """Has the ranks delete from scratch the activation shards that no record names."""
        if self.scratch:
            self.on_all(call(Rank.sweep_scratch, kept_names(self.run)))

    def pruned(self, block: int) -> BlockRecord | None:
        """The record of the pruned block, for a forward pass; None (dense) in an evaluation.

        In a pruning job a missing record raises: a silent fallback to dense weights would be wrong.
        """
        return self.read_record(block) if self.layers else None

    def read_record(self, block: int) -> BlockRecord:
        """The committed record of a block. Raises `CorruptFileError` if missing or damaged."""
        return read_record(self.run.record(block))

    def read_solved(self, block: int) -> BlockRecord:
        """The record of a block's solved row slices. Raises as `read_record`."""
        return read_record(self.run.solved(block))

    def on_all(self, phase: Call[T]) -> list[Outcome[T]]:
        """Runs the same call on every rank; outcomes in rank order."""
        return self.executor.run([phase] * self.executor.world)

    def stamp(self) -> str:
        """A part of file names that is unique to one attempt of one driver.

        So files need no rename, and a late writer cannot overwrite those of another attempt.
        """
        self.attempts += 1
        return f"{self.lock.nonce[:STAMP_DIGITS]}-{self.attempts}"

    # -- the phases of a block --------------------------------------------------------------

    def _calibrate(
        self, block: int, shards: list[StoredFile], number: int, times: Times
    ) -> Observed:
        """Has the ranks sum the statistics of a pass's groups."""
        self.progress.phase("calibrate", block)
        phase = call(Rank.calibrate, block, shards, self.hessian_memory, number)
        return self.timed(times, phase)[0].value

    def _reduce(self, block: int, times: Times) -> None:
        """Sums the statistics over all ranks; every rank gets the sum."""
        began = time.perf_counter()
        self.progress.phase("reduce", block)
        outcomes = self.executor.reduce()
        add_phase(times, "reduce", time.perf_counter() - began, outcomes)

    def _choices(self, block: int, times: Times) -> Choices:
        """The settings chosen for each group: committed before first use, replayed on resume."""
        path = self.run.choices(block)
        committed = read_choices(path) if path.exists() else {}
        groups = self.on_all(call(Rank.groups_held))[0].value
        if not all(group.name in committed for group in groups):
            self.progress.phase("choose", block)
            outcomes = self.timed(times, call(Rank.choose, block))
            chosen = {name: choice for o in outcomes for name, choice in o.value.items()}
            committed = chosen | committed
            write_choices(path, block, committed, self.lock.assert_held)
        return committed

    def _solve(self, block: int, choices: Choices | None, times: Times) -> list[SolvedSlices]:
        """Has the ranks solve the layers whose statistics they have; one result per rank."""
        self.progress.phase("solve", block)
        outcomes = self.timed(times, call(Rank.solve, block, self.stamp(), choices))
        return [outcome.value for outcome in outcomes]

    def _solved(self, block: int) -> BlockRecord | None:
        """The record of a block's solved row slices; None if there is none."""
        return self.read_solved(block) if self.run.solved(block).exists() else None

    def _dense(self, block: int, times: Times) -> None:
        """Computes and commits the targets of `block`'s outputs."""
        assert self.reconstruction is not None
        run = self.run.targets()
        of_targets = self.reconstruction.dense_chain and block > 0
        if of_targets:
            shards = read_inputs(run.activation_record(block))
        else:
            shards, _ = self.inputs(block)
        self.progress.phase("dense", block)
        phase = call(Rank.dense, block, shards, of_targets, self.stamp())
        outcomes = self.timed(times, phase)
        written = [shard for o in outcomes for shard in o.value]
        workers = self.executor.workers()
        commit_inputs(run, block + 1, written, workers, None, self.lock.assert_held)

    def _nearest_inputs(self, block: int) -> int | None:
        """The largest number up to `block` of a block whose inputs are committed, if any."""
        committed = (b for b in range(block, -1, -1) if self.run.activation_record(b).exists())
        return next(committed, None)

    def _embed(self) -> None:
        self.progress.phase("embed")
        times: Times = {}
        outcomes = self.timed(times, call(Rank.embed, self.stamp()))
        self._commit_inputs(0, [shard for o in outcomes for shard in o.value], times)

    def _propagate(self, block: int) -> None:
        """Computes and commits the inputs of the block after `block`."""
        self.progress.phase("propagate", block)
        times: Times = {}
        shards = read_inputs(self.run.activation_record(block))
        phase = call(Rank.propagate, block, self.pruned(block), shards, self.stamp())
        outcomes = self.timed(times, phase)
        self._commit_inputs(block + 1, [shard for o in outcomes for shard in o.value], times)

    def _advance(self, block: int) -> Observed:
        """`_propagate`, which also sums the statistics of the block after `block`."""
        self.progress.phase("propagate", block)
        times: Times = {}
        shards = read_inputs(self.run.activation_record(block))
        record = self.pruned(block)
        phase = call(Rank.advance, block, record, shards, self.stamp(), self.hessian_memory)
        outcomes = self.timed(times, phase)
        self._commit_inputs(block + 1, [shard for o in outcomes for shard in o.value.shards], times)
        return outcomes[0].value.observed

    def _commit_inputs(self, block: int, shards: list[StoredFile], times: Times) -> None:
        """Publishes the record of block `block`'s inputs."""
        workers = self.executor.workers()
        commit_inputs(self.run, block, shards, workers, times, self.lock.assert_held)

    def timed(self, times: Times, phase: Call[T]) -> list[Outcome[T]]:
        """`on_all`, whose times are added to `times`."""
        began = time.perf_counter()
        outcomes = self.on_all(phase)
        add_phase(times, phase.phase, time.perf_counter() - began, outcomes)
        return outcomes
