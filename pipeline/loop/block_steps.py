"""One attempt at a block: its inputs, its statistics, its solve, the record of what was written.

Per block: `calibrate` (dense forward, partial sums), `reduce`, `solve`, then `propagate` (pruned
forward, next inputs); in one pass with the next block's `calibrate` it is called `advance`.
Nothing here is tried again: `block_loop` decides that.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.loop.executor import Executor
from pipeline.loop.rank import Call, Rank, call
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
    """What is done with a block on an executor. One driver at a time: the holder of `lock`.

    `layers` gives per block the pruned layers' shapes; `dtypes` their stored dtypes (safetensors
    names); both are empty for an evaluation. `calibrates` is False for a method that needs no
    statistics: no activations then. `chooses`: whether a part of the settings is chosen per group
    before solving. `hessian_memory`: bytes of statistics that a rank may hold at once; a block's
    groups are taken in several passes where theirs are more; None leaves it to the ranks' devices.
    `scratch`: whether activation shards are on the nodes' own scratch, which the ranks alone see.
    `attempts`: how many have been made, which makes the names of files.
    """

    executor: Executor
    run: RunDirectory
    lock: RunLock
    progress: Progress
    blocks: int
    layers: Sequence[dict[str, tuple[int, int]]] = ()
    dtypes: Sequence[dict[str, str]] = ()
    calibrates: bool = True
    chooses: bool = False
    hessian_memory: float | None = None
    scratch: bool = False
    attempts: int = field(default=0, init=False)

    def solve(self, block: int, failures: Sequence[str]) -> BlockRecord:
        """Everything of a block but its commit: the record that names the files written.

        failures: why earlier attempts failed; they are recorded.
        """
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
            for number in range(observed.passes):
                if number:
                    self._calibrate(block, shards, number, times)
                self._reduce(block, times)
                choices = self._choices(block, times) if self.chooses else None
                solved.append(self._solve(block, choices, times))
        results = {
            "groups": groups,
            "choices": choices,
            # One entry a rank, with the groups of all passes.
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
        """The activation shards that block `block` reads, made if they are not there.

        Starts from the nearest committed inputs below `block`, or from the tokens; an older store
        is deleted as soon as the one made from it is committed. With `observe`, a last step that
        is still to be made also runs the dense block on what it writes: the ranks then hold the
        statistics of the first pass's groups, and what they observed is returned.
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

    def sweep_scratch(self) -> None:
        """Has the ranks delete what no record names from their nodes' scratch."""
        if self.scratch:
            self.on_all(call(Rank.sweep_scratch, kept_names(self.run)))

    def pruned(self, block: int) -> BlockRecord | None:
        """What replaces the block's weights in a forward pass; None, for an evaluation, nothing.

        In a job a missing record is damage: going on from dense weights would be silently wrong.
        """
        return self.read_record(block) if self.layers else None

    def read_record(self, block: int) -> BlockRecord:
        """The committed record of a block. Raises `CorruptFileError` where it is damaged."""
        return read_record(self.run.record(block))

    def on_all(self, phase: Call[T]) -> list[Outcome[T]]:
        """Runs the same call on every rank; outcomes in rank order."""
        return self.executor.run([phase] * self.executor.world)

    def stamp(self) -> str:
        """A name part that no other attempt of any driver uses: files are never renamed."""
        self.attempts += 1
        return f"{self.lock.nonce[:STAMP_DIGITS]}-{self.attempts}"

    # -- the phases of a block --------------------------------------------------------------

    def _calibrate(
        self, block: int, shards: list[StoredFile], number: int, times: Times
    ) -> Observed:
        """Has the ranks sum the statistics of a pass's groups."""
        self.progress.phase("calibrate", block)
        phase = call(Rank.calibrate, block, shards, self.hessian_memory, number)
        return self._timed(times, phase)[0].value

    def _reduce(self, block: int, times: Times) -> None:
        """Has every rank hold the sum of all ranks' statistics."""
        began = time.perf_counter()
        self.progress.phase("reduce", block)
        outcomes = self.executor.reduce()
        add_phase(times, "reduce", time.perf_counter() - began, outcomes)

    def _choices(self, block: int, times: Times) -> Choices:
        """What is chosen for each group: committed before its first use, replayed on resume."""
        path = self.run.choices(block)
        committed = read_choices(path) if path.exists() else {}
        held = self.on_all(call(Rank.groups_held))[0].value
        if not all(group.name in committed for group in held):
            self.progress.phase("choose", block)
            outcomes = self._timed(times, call(Rank.choose, block))
            chosen = {name: choice for o in outcomes for name, choice in o.value.items()}
            committed = chosen | committed
            write_choices(path, block, committed, self.lock.assert_held)
        return committed

    def _solve(self, block: int, choices: Choices | None, times: Times) -> list[SolvedSlices]:
        """Has the ranks solve the layers whose statistics they hold."""
        self.progress.phase("solve", block)
        outcomes = self._timed(times, call(Rank.solve, block, self.stamp(), choices))
        return [outcome.value for outcome in outcomes]

    def _nearest_inputs(self, block: int) -> int | None:
        """The block next below, or `block` itself, whose inputs are committed."""
        committed = (b for b in range(block, -1, -1) if self.run.activation_record(b).exists())
        return next(committed, None)

    def _embed(self) -> None:
        self.progress.phase("embed")
        times: Times = {}
        outcomes = self._timed(times, call(Rank.embed, self.stamp()))
        self._commit_inputs(0, [shard for o in outcomes for shard in o.value], times)

    def _propagate(self, block: int) -> None:
        """Makes the inputs of the block after `block`."""
        self.progress.phase("propagate", block)
        times: Times = {}
        shards = read_inputs(self.run.activation_record(block))
        phase = call(Rank.propagate, block, self.pruned(block), shards, self.stamp())
        outcomes = self._timed(times, phase)
        self._commit_inputs(block + 1, [shard for o in outcomes for shard in o.value], times)

    def _advance(self, block: int) -> Observed:
        """The same, and observes the block after `block` on them."""
        self.progress.phase("propagate", block)
        times: Times = {}
        shards = read_inputs(self.run.activation_record(block))
        record = self.pruned(block)
        phase = call(Rank.advance, block, record, shards, self.stamp(), self.hessian_memory)
        outcomes = self._timed(times, phase)
        self._commit_inputs(block + 1, [shard for o in outcomes for shard in o.value.shards], times)
        return outcomes[0].value.observed

    def _commit_inputs(self, block: int, shards: list[StoredFile], times: Times) -> None:
        """Publishes the record of block `block`'s inputs."""
        workers = self.executor.workers()
        commit_inputs(self.run, block, shards, workers, times, self.lock.assert_held)

    def _timed(self, times: Times, phase: Call[T]) -> list[Outcome[T]]:
        began = time.perf_counter()
        outcomes = self.on_all(phase)
        add_phase(times, phase.phase, time.perf_counter() - began, outcomes)
        return outcomes
