"""The block loop, written once for every executor.

Per block: `calibrate` (dense forward, partial sums), `reduce`, `solve`, the record (the commit
point), then `propagate` (pruned forward, next inputs); in one pass with the next block's
`calibrate` it is called `advance`. Progress lives in the run directory alone:
a block with a record is done, a block whose inputs have a record can be run, and inputs that are
missing are made again from the tokens through the committed blocks. What turns out to be damaged
is made again by `pipeline.loop.repair`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from pipeline.loop.executor import Executor
from pipeline.loop.repair import Repairs
from pipeline.loop.retry import AttemptHistory
from pipeline.messages import Advanced, Job, Observed, Outcome, Reference, SolvedSlices, Target
from pipeline.records.block import block_error, block_record, read_record
from pipeline.records.inputs import ACTIVATIONS_SCHEMA, CHOICES_SCHEMA, read_inputs
from pipeline.records.scratch import kept_names
from pipeline.records.times import PhaseTimes, add_phase
from pipeline.runtime.progress import Progress
from pipeline.runtime.stopwatch import peak_memory
from storage.errors import CorruptFileError, Prox24Error, WorkerLostError, WorkerMemoryError
from storage.files.commit import publish_json, read_json, replace_json
from storage.files.hashing import StoredFile
from storage.run.checkpoints import BlockRecord
from storage.run.directory import RunDirectory
from storage.run.lock import STAMP_DIGITS, RunLock

logger = logging.getLogger(__name__)


T = TypeVar("T")


@dataclass
class BlockLoop:
    """Runs blocks on an executor and commits them. One driver at a time: the holder of `lock`.

    `layers` gives per block the pruned layers' shapes; `dtypes` their stored dtypes (safetensors
    names); both are empty for an evaluation. `calibrates` is False for a method that needs no
    statistics: no activations then. `chooses`: whether a part of the settings is chosen per group
    before solving. `hessian_memory`: bytes of statistics that a rank may hold at once; a block's
    groups are taken in turns where theirs are more; None leaves it to the ranks' devices.
    `mend_tokens` makes the tokens' file again if it is damaged, and tells so; `manifest` is what
    `run.json` says, once that is known. `scratch`: whether activation shards are on the nodes' own
    scratch, which the ranks alone see.
    """

    executor: Executor
    run: RunDirectory
    lock: RunLock
    progress: Progress
    blocks: int
    layers: Sequence[dict[str, tuple[int, int]]]
    dtypes: Sequence[dict[str, str]]
    calibrates: bool
    chooses: bool
    max_attempts: int
    hessian_memory: float | None = None
    mend_tokens: Callable[[], bool] | None = None
    scratch: bool = False
    manifest: dict[str, Any] | None = field(default=None, init=False)
    # Blocks below this number have been committed.
    begun: int = field(default=0, init=False)
    _attempt: int = field(default=0, init=False)
    # Why the work under way failed before.
    _failures: list[str] = field(default_factory=list, init=False)

    def prune(self) -> None:
        """Commits every block that is not committed yet, in order."""
        if self.calibrates and self.hessian_memory is None:
            rooms = [outcome.value for outcome in self.guarded("hessian_memory", self.each)]
            # The same on every rank, or they would take other turns.
            self.hessian_memory = min((room for room in rooms if room is not None), default=None)
        self.begun = self.run.blocks_begun()
        self.persist("the scratch", self.sweep_scratch)
        if self.begun or self.run.committed_activations():
            self.persist("the repair", lambda: Repairs(self).mend(hashed=False))
        for block in range(self.begun, self.blocks):
            self.persist(f"block {block}", partial(self._prune_block, block))
            self.begun = block + 1
        if self.calibrates:
            for block in range(self.blocks):
                self.run.remove_activations(block, self.lock.assert_held)
            self.persist("the scratch", self.sweep_scratch)

    def start(self, job: Job) -> None:
        """Makes the ranks; those that are lost meanwhile are replaced."""
        started = False

        def begin() -> None:
            nonlocal started
            if not started:
                started = True
                self.executor.start(job)

        self.persist("the start of the workers", begin)

    def persist(self, what: str, work: Callable[[], T]) -> T:
        """Does `work`; again where workers were lost, or a damaged file was made again.

        Raises `Prox24Error` where workers are lost too often, `WorkerMemoryError` where they ran
        out of memory twice, `CorruptFileError` where damage cannot be mended, because it is not in
        the run directory, or comes back too often.
        """
        history = AttemptHistory(self.max_attempts)
        before, self._failures = self._failures, history.failures
        damaged: CorruptFileError | None = None
        lost = False
        try:
            while True:
                try:
                    if lost:
                        self._recover(what)
                        lost = False
                        if self.scratch:
                            # Another node's scratch is another one.
                            Repairs(self).mend_inputs()
                    if damaged is not None:
                        self._mend(damaged)
                        damaged = None
                    return work()
                except (WorkerLostError, WorkerMemoryError) as error:
                    if not history.should_retry(error):
                        raise self._given_up(what, error, history) from error
                    attempt = len(history.failures)
                    self.progress.attempt_failed(what, attempt, history.max_attempts, str(error))
                    lost = True
                except CorruptFileError as error:
                    history.failures.append(str(error))
                    if error is damaged or len(history.failures) >= self.max_attempts:
                        raise
                    damaged = error
        except Exception as error:
            if not isinstance(error, Prox24Error):
                error.add_note(f"({what})")
            raise
        finally:
            self._failures = before

    def _mend(self, error: CorruptFileError) -> None:
        """Makes again what is damaged; raises `error` where nothing in the run directory is."""
        if not Repairs(self).mend(hashed=True):
            raise error

    def guarded(
        self, phase: str, arguments: Callable[[], Sequence[tuple[Any, ...]]]
    ) -> list[Outcome]:
        """One phase outside a block, done again when workers are lost."""
        return self.persist(f"phase {phase}", lambda: self.executor.run(phase, arguments()))

    def evaluate(self) -> list[Outcome]:
        """Runs the model as it is, block by block; each rank's losses, in rank order."""
        return self._at_the_end("losses")

    def likelihoods(self, targets: Sequence[Sequence[Target]]) -> list[Outcome]:
        """Each rank's likelihoods of its sequences' targets, in rank order."""
        return self._at_the_end("likelihoods", targets)

    def compare(self, reference: Reference) -> list[Outcome]:
        """Each rank's distances from another model, in rank order; `evaluate` has run in both."""
        return self._at_the_end("distances", reference)

    def _at_the_end(self, phase: str, *arguments: Any) -> list[Outcome]:
        """A phase on the outputs of the last block, which are made if they are not there."""

        def work() -> list[Outcome]:
            shards, _ = self.inputs(self.blocks)
            self.progress.phase(phase)
            return self.executor.run(phase, self.each(self.blocks, shards, *arguments))

        return self.persist("the evaluation", work)

    def _recover(self, what: str) -> None:
        began = time.perf_counter()
        self.executor.recover()
        seconds = time.perf_counter() - began
        self.progress.note(
            f"{what}: {self.executor.world} workers are ready again after {seconds:.1f} s"
        )

    def _given_up(self, what: str, error: Prox24Error, history: AttemptHistory) -> Prox24Error:
        kind = type(error) if isinstance(error, WorkerMemoryError) else Prox24Error
        kept = len(self.run.committed_blocks())
        return kind(
            f"{what} failed {len(history.failures)} times ({history.summary()}); {kept} of "
            f"{self.blocks} blocks are committed in {self.run.path} and kept: run the same command "
            "again to go on"
        )

    def _prune_block(self, block: int) -> None:
        record = self.solve(block)
        publish_json(self.run.record(block), record.to_json(), guard=self.lock.assert_held)
        self.progress.block_done(block, block_error(record))

    def solve(self, block: int) -> BlockRecord:
        """Everything of a block but its commit: the record that names the files written."""
        started = time.perf_counter()
        times: dict[str, PhaseTimes] = {}
        groups: list[Any] = []
        solved: list[list[SolvedSlices]] = []
        choices: dict[str, dict[str, Any]] | None = None
        if not self.layers[block]:
            logger.debug("block %d stays dense", block)
        elif self.calibrates:
            shards, observed = self.inputs(block, observe=True)
            if observed is None:
                observed = self._calibrate(block, shards, 0, times)
            groups = [list(group.layers) for group in observed.groups]
            for turn in range(observed.turns):
                if turn:
                    self._calibrate(block, shards, turn, times)
                self._reduce(block, times)
                choices = self._choices(block, times) if self.chooses else None
                solved.append(self._solve(block, choices, times))
        else:
            solved.append(self._solve(block, None, times))
        results = {
            "groups": groups,
            "choices": choices,
            # Of each rank, all turns' together.
            "costs": [
                {group: cost for part in own for group, cost in part.costs.items()}
                for own in zip(*solved, strict=True)
            ],
            "phases": {name: phase.to_json() for name, phase in times.items()},
            "seconds": time.perf_counter() - started,
            "driver_memory": peak_memory(),
            "workers": self.executor.workers(),
            "failures": list(self._failures),
        }
        return block_record(
            block,
            self._attempt,
            self.executor.world,
            {name: (shape, self.dtypes[block][name]) for name, shape in self.layers[block].items()},
            [part for turn in solved for part in turn],
            results,
        )

    def _calibrate(
        self, block: int, shards: list[StoredFile], turn: int, times: dict[str, PhaseTimes]
    ) -> Observed:
        """Has the ranks sum the statistics of a turn's groups."""
        self.progress.phase("calibrate", block)
        arguments = self.each(block, shards, self.hessian_memory, turn)
        observed: Observed = self._timed(times, "calibrate", arguments)[0].value
        return observed

    def _reduce(self, block: int, times: dict[str, PhaseTimes]) -> None:
        """Has every rank hold the sum of all ranks' statistics."""
        began = time.perf_counter()
        self.progress.phase("reduce", block)
        outcomes = self.executor.reduce()
        add_phase(times, "reduce", time.perf_counter() - began, outcomes)

    def _solve(
        self,
        block: int,
        choices: dict[str, dict[str, Any]] | None,
        times: dict[str, PhaseTimes],
    ) -> list[SolvedSlices]:
        """Has the ranks solve the layers whose statistics they hold."""
        self.progress.phase("solve", block)
        arguments = self.each(block, self.stamp(), choices)
        return [outcome.value for outcome in self._timed(times, "solve", arguments)]

    def _choices(self, block: int, times: dict[str, PhaseTimes]) -> dict[str, dict[str, Any]]:
        """What is chosen for each group: committed before its first use, replayed on resume."""
        path = self.run.choices(block)
        committed: dict[str, dict[str, Any]] = {}
        if path.exists():
            committed = read_json(path, CHOICES_SCHEMA)["groups"]
        held = [group.name for group in self.executor.run("held_groups", self.each())[0].value]
        if not all(name in committed for name in held):
            self.progress.phase("choose", block)
            outcomes = self._timed(times, "choose", self.each(block))
            chosen = {name: own for o in outcomes for name, own in o.value.items()}
            committed = chosen | committed
            payload = {"schema_version": CHOICES_SCHEMA, "block": block, "groups": committed}
            replace_json(path, payload, guard=self.lock.assert_held)
        return committed

    def inputs(
        self, block: int, *, observe: bool = False
    ) -> tuple[list[StoredFile], Observed | None]:
        """The activation shards that block `block` reads, made if they are not there.

        Starts from the nearest committed inputs below `block`, or from the tokens; an older store
        is deleted as soon as the one made from it is committed. With `observe`, a last step that
        is still to be made also runs the dense block on what it writes: the ranks then hold the
        statistics of the first turn's groups, and what they observed is returned.
        """
        observed: Observed | None = None
        for below in range(block, -1, -1):
            if self.run.activation_record(below).exists():
                break
        else:
            below = 0
            self.progress.phase("embed")
            self._make_inputs(0, "embed", lambda stamp: (stamp,))
        for older in range(below):
            self.run.remove_activations(older, self.lock.assert_held)
        for current in range(below, block):
            self.progress.phase("propagate", current)
            record = self.pruned(current)
            shards = read_inputs(self.run.activation_record(current))
            last = observe and current + 1 == block
            more = (self.hessian_memory,) if last else ()
            outcomes = self._make_inputs(
                current + 1,
                "advance" if last else "propagate",
                lambda stamp, b=current, r=record, s=shards, m=more: (b, r, s, stamp, *m),
            )
            if last:
                observed = outcomes[0].value.observed
            self.run.remove_activations(current, self.lock.assert_held)
            self.sweep_scratch()
        return read_inputs(self.run.activation_record(block)), observed

    def sweep_scratch(self) -> None:
        """Has the ranks delete what no record names from their nodes' scratch."""
        if self.scratch:
            self.executor.run("scratch", self.each("sweep", kept_names(self.run)))

    def _make_inputs(self, block: int, phase: str, arguments: Any) -> list[Outcome]:
        """Runs the phase that writes block `block`'s inputs and publishes their record."""
        stamp = self.stamp()
        times: dict[str, PhaseTimes] = {}
        outcomes = self._timed(times, phase, self.each(*arguments(stamp)))
        values = [o.value.shards if isinstance(o.value, Advanced) else o.value for o in outcomes]
        shards = [shard.to_json() for value in values for shard in value]
        payload = {
            "schema_version": ACTIVATIONS_SCHEMA,
            "block": block,
            "shards": shards,
            "workers": self.executor.workers(),
            "phases": {name: phase_times.to_json() for name, phase_times in times.items()},
        }
        # The store and its record are deleted soon; the report still wants the times. Written
        # before the commit, or a kill between the two would lose them.
        path = self.run.report() / f"inputs-{block:03d}.json"
        replace_json(path, payload, guard=self.lock.assert_held)
        publish_json(self.run.activation_record(block), payload, guard=self.lock.assert_held)
        return outcomes

    def pruned(self, block: int) -> BlockRecord | None:
        """What replaces the block's weights in a forward pass; None, for an evaluation, nothing.

        In a job a missing record is damage: going on from dense weights would be silently wrong.
        """
        return self.read_record(block) if self.layers else None

    def read_record(self, block: int) -> BlockRecord:
        """The committed record of a block. Raises `CorruptFileError` where it is damaged."""
        return read_record(self.run.record(block))

    def _timed(
        self, times: dict[str, PhaseTimes], phase: str, arguments: Sequence[tuple[Any, ...]]
    ) -> list[Outcome]:
        began = time.perf_counter()
        outcomes = self.executor.run(phase, arguments)
        add_phase(times, phase, time.perf_counter() - began, outcomes)
        return outcomes

    def each(self, *arguments: Any) -> list[tuple[Any, ...]]:
        """The same arguments for every rank."""
        return [arguments] * self.executor.world

    def stamp(self) -> str:
        """A name part that no other attempt of any driver uses: files are never renamed."""
        self._attempt += 1
        return f"{self.lock.nonce[:STAMP_DIGITS]}-{self._attempt}"
