"""The block loop: the order of blocks, and retries. The same loop for every executor.

A block is committed by its record. Progress is in the run directory only: a block with a record is
done; a block whose inputs have a record can be run; missing inputs are recomputed from the tokens
through the committed blocks. Damaged files are restored by `pipeline.loop.repair`. One attempt at a
block is in `pipeline.loop.block_steps`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pipeline.loop.block_steps import BlockSteps
from pipeline.loop.rank import Call, Rank, call
from pipeline.loop.repair import Repairs
from pipeline.loop.retry import AttemptHistory
from pipeline.messages import Job, Likelihood, Outcome, Reference, SequenceDistance, Target
from pipeline.reconstruct.results import notes, output_error, result_of
from pipeline.records.block import block_error, deviations_in_words
from storage.errors import CorruptFileError, Prox24Error, WorkerLostError, WorkerMemoryError
from storage.files.commit import publish_json

T = TypeVar("T")
Failures = Sequence[str]
"""The errors of earlier attempts at the same work, one line each."""


@dataclass
class BlockLoop:
    """Runs all blocks, each until it is committed.

    max_attempts: attempts at a block when workers are lost. mend_tokens: restores the tokens' file
    if it is damaged, and returns whether it was. manifest: the content of `run.json`, once known.
    begun: blocks below this number have been committed.
    """

    steps: BlockSteps
    max_attempts: int
    mend_tokens: Callable[[], bool] | None = None
    manifest: dict[str, Any] | None = field(default=None, init=False)
    begun: int = field(default=0, init=False)

    def start(self, job: Job) -> None:
        """Starts the ranks; workers that are lost meanwhile are replaced."""
        started = False

        def start_once(_: Failures) -> None:
            # After a failure `persist` has recovered the executor: there is nothing left to do.
            nonlocal started
            if not started:
                started = True
                self.steps.executor.start(job)

        self.persist("the start of the workers", start_once)

    def prune(self) -> None:
        """Prunes and commits every block that is not committed yet, in order."""
        steps, run = self.steps, self.steps.run
        if steps.calibrates and steps.hessian_memory is None:
            limits = [outcome.value for outcome in self.on_all(call(Rank.hessian_memory))]
            # The smallest of all ranks': with different limits, ranks would divide a block's groups
            # over different passes.
            steps.hessian_memory = min((each for each in limits if each is not None), default=None)
        self.begun = run.blocks_begun()
        self.persist("the scratch", lambda _: steps.sweep_scratch())
        if self.begun or run.committed_activations():
            self.persist("the repair", lambda failures: self._repairs(failures).mend(hashed=False))
        for block in range(self.begun, steps.blocks):
            self._prune_block(block)
            self.begun = block + 1
        if steps.keeps_inputs:
            run.remove_all_activations(steps.lock.assert_held)
            self.persist("the scratch", lambda _: steps.sweep_scratch())

    def losses(self) -> list[float]:
        """Runs the model block by block; the summed next-token loss (nats) of each sequence."""
        outcomes = self._on_outputs("losses", lambda shards: call(Rank.losses, self._last, shards))
        return [loss for outcome in outcomes for loss in outcome.value]

    def likelihoods(self, targets: Sequence[Sequence[Target]]) -> list[list[Likelihood]]:
        """The likelihoods of each sequence's targets, in order."""
        outcomes = self._on_outputs(
            "likelihoods", lambda shards: call(Rank.likelihoods, self._last, shards, targets)
        )
        return [likelihoods for outcome in outcomes for likelihoods in outcome.value]

    def distances(self, reference: Reference) -> list[SequenceDistance]:
        """Each sequence's distance from the reference model; call `losses` on both first."""
        outcomes = self._on_outputs(
            "distances", lambda shards: call(Rank.distances, self._last, shards, reference)
        )
        return [distance for outcome in outcomes for distance in outcome.value]

    def on_all(self, phase: Call[T]) -> list[Outcome[T]]:
        """Runs a phase outside the blocks on every rank, with retries."""
        return self.persist(f"phase {phase.phase}", lambda _: self.steps.on_all(phase))

    def persist(self, what: str, work: Callable[[Failures], T]) -> T:
        """Runs `work`, which messages call `what`, until it succeeds; returns its result.

        After a lost worker the executor recovers, and after a damaged file the run directory is
        repaired, before the next attempt.

        Raises `Prox24Error` if workers are lost too often, `WorkerMemoryError` if they run out of
        memory twice, `CorruptFileError` if the damage cannot be repaired (a file of the source
        model) or recurs too often.
        """
        history, pending = AttemptHistory(self.max_attempts), _Repair()
        with _named(what):
            while True:
                try:
                    self._repair(what, pending, history.failures)
                    return work(history.failures)
                except (WorkerLostError, WorkerMemoryError) as error:
                    if not history.should_retry(error):
                        raise self._final_error(what, error, history) from error
                    attempt = len(history.failures)
                    self.steps.progress.attempt_failed(
                        what, attempt, history.max_attempts, str(error)
                    )
                    pending.workers = True
                except CorruptFileError as error:
                    if not history.should_mend(error) or error is pending.file:
                        raise
                    pending.file = error

    # -- parts of these ---------------------------------------------------------------------

    @property
    def _last(self) -> int:
        """The number of blocks: under it the last block's outputs are stored, as inputs."""
        return self.steps.blocks

    def _prune_block(self, block: int) -> None:
        """Solves and commits one block."""
        steps = self.steps

        def solve_and_commit(failures: Failures) -> None:
            record = steps.prune(block, failures)
            publish_json(steps.run.record(block), record.to_json(), guard=steps.lock.assert_held)
            steps.run.remove_solved(block, steps.lock.assert_held)
            trained = result_of(record.results)
            steps.progress.block_done(block, block_error(record), output_error(trained))
            name = f"{steps.blocks_path}.{block}"
            for line in (*deviations_in_words(record, f"{name}."), *notes(trained, name)):
                steps.progress.note(line)

        self.persist(f"block {block}", solve_and_commit)

    def _on_outputs(self, name: str, make: Callable[[Any], Call[T]]) -> list[Outcome[T]]:
        """Runs a phase on the last block's outputs, which are computed if they are missing."""

        def work(_: Failures) -> list[Outcome[T]]:
            shards, _observed = self.steps.inputs(self._last)
            self.steps.progress.phase(name)
            return self.steps.on_all(make(shards))

        return self.persist("the evaluation", work)

    def _repair(self, what: str, pending: _Repair, failures: Failures) -> None:
        """Repairs what the last attempt left broken; each part once, even if the next one fails."""
        if pending.workers:
            self._recover(what)
            pending.workers = False
            if self.steps.scratch:
                # A new worker may be on another node, whose scratch lacks the rank's shards.
                self._repairs(failures).mend_inputs()
        if pending.file is not None:
            if not self._repairs(failures).mend(hashed=True):
                raise pending.file
            pending.file = None

    def _repairs(self, failures: Failures) -> Repairs:
        return Repairs(self.steps, self.begun, self.manifest, self.mend_tokens, failures)

    def _recover(self, what: str) -> None:
        began, executor = time.perf_counter(), self.steps.executor
        executor.recover()
        seconds = time.perf_counter() - began
        self.steps.progress.note(
            f"{what}: {executor.world} workers are ready again after {seconds:.1f} s"
        )

    def _final_error(self, what: str, error: Prox24Error, history: AttemptHistory) -> Prox24Error:
        kind = type(error) if isinstance(error, WorkerMemoryError) else Prox24Error
        run = self.steps.run
        return kind(
            f"{what} failed {len(history.failures)} times ({history.summary()}); "
            f"{len(run.committed_blocks())} of {self.steps.blocks} blocks are committed in "
            f"{run.path} and kept: run the same command again to go on"
        )


@dataclass
class _Repair:
    """What must be repaired before the next attempt: lost workers, a damaged file."""

    workers: bool = False
    file: CorruptFileError | None = None


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Adds to an unexpected error a note that names the work it occurred in."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, Prox24Error):
            error.add_note(f"({what})")
        raise
