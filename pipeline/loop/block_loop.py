"""The block loop, written once for every executor: the order of blocks, and what is tried again.

A block is committed by its record. Progress lives in the run directory alone: a block with a
record is done, a block whose inputs have a record can be run, and inputs that are missing are made
again from the tokens through the committed blocks. What turns out to be damaged is made again by
`pipeline.loop.repair`.
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
from pipeline.records.block import block_error
from storage.errors import CorruptFileError, Prox24Error, WorkerLostError, WorkerMemoryError
from storage.files.commit import publish_json

T = TypeVar("T")
Failures = Sequence[str]
"""Why earlier attempts at a piece of work failed."""


@dataclass
class BlockLoop:
    """Runs all blocks, each until it is committed.

    `max_attempts`: how often a block is tried when workers are lost. `mend_tokens` makes the
    tokens' file again if it is damaged, and returns whether it was. `manifest` is the content of
    `run.json`, once that is known. `begun`: blocks below this number have been committed.
    """

    steps: BlockSteps
    max_attempts: int
    mend_tokens: Callable[[], bool] | None = None
    manifest: dict[str, Any] | None = field(default=None, init=False)
    begun: int = field(default=0, init=False)

    def start(self, job: Job) -> None:
        """Makes the ranks; those that are lost meanwhile are replaced."""
        started = False

        def begin(_: Failures) -> None:
            nonlocal started
            if not started:
                started = True
                self.steps.executor.start(job)

        self.persist("the start of the workers", begin)

    def prune(self) -> None:
        """Commits every block that is not committed yet, in order."""
        steps, run = self.steps, self.steps.run
        if steps.calibrates and steps.hessian_memory is None:
            limits = [outcome.value for outcome in self.on_all(call(Rank.hessian_memory))]
            # The same on every rank, or they would take other passes.
            steps.hessian_memory = min((each for each in limits if each is not None), default=None)
        self.begun = run.blocks_begun()
        self.persist("the scratch", lambda _: steps.sweep_scratch())
        if self.begun or run.committed_activations():
            self.persist("the repair", lambda failures: self._repairs(failures).mend(hashed=False))
        for block in range(self.begun, steps.blocks):
            self._prune_block(block)
            self.begun = block + 1
        if steps.calibrates:
            for block in range(steps.blocks):
                run.remove_activations(block, steps.lock.assert_held)
            self.persist("the scratch", lambda _: steps.sweep_scratch())

    def losses(self) -> list[float]:
        """Runs the model as it is, block by block; the loss of each sequence, in order."""
        outcomes = self._on_outputs("losses", lambda shards: call(Rank.losses, self._last, shards))
        return [loss for outcome in outcomes for loss in outcome.value]

    def likelihoods(self, targets: Sequence[Sequence[Target]]) -> list[list[Likelihood]]:
        """The same for likelihoods: those of each sequence's targets, in order."""
        outcomes = self._on_outputs(
            "likelihoods", lambda shards: call(Rank.likelihoods, self._last, shards, targets)
        )
        return [likelihoods for outcome in outcomes for likelihoods in outcome.value]

    def distances(self, reference: Reference) -> list[SequenceDistance]:
        """Each sequence's distance from another model; `losses` has run in both."""
        outcomes = self._on_outputs(
            "distances", lambda shards: call(Rank.distances, self._last, shards, reference)
        )
        return [distance for outcome in outcomes for distance in outcome.value]

    def on_all(self, phase: Call[T]) -> list[Outcome[T]]:
        """A phase outside the blocks on every rank, done again when workers are lost."""
        return self.persist(f"phase {phase.phase}", lambda _: self.steps.on_all(phase))

    def persist(self, what: str, work: Callable[[Failures], T]) -> T:
        """Does `work`; again where workers were lost, or a damaged file was made again.

        Raises `Prox24Error` where workers are lost too often, `WorkerMemoryError` where they ran
        out of memory twice, `CorruptFileError` where damage cannot be mended, because it is not in
        the run directory, or comes back too often.
        """
        history, broken = AttemptHistory(self.max_attempts), _Broken()
        with _named(what):
            while True:
                try:
                    self._put_right(what, broken, history.failures)
                    return work(history.failures)
                except (WorkerLostError, WorkerMemoryError) as error:
                    if not history.should_retry(error):
                        raise self._given_up(what, error, history) from error
                    attempt = len(history.failures)
                    self.steps.progress.attempt_failed(
                        what, attempt, history.max_attempts, str(error)
                    )
                    broken.workers = True
                except CorruptFileError as error:
                    if not history.should_mend(error) or error is broken.file:
                        raise
                    broken.file = error

    # -- pieces -----------------------------------------------------------------------------

    @property
    def _last(self) -> int:
        """The number of the block after the last one, whose inputs are the last one's outputs."""
        return self.steps.blocks

    def _prune_block(self, block: int) -> None:
        """Solves and commits one block."""
        steps = self.steps

        def solve_and_commit(failures: Failures) -> None:
            record = steps.solve(block, failures)
            publish_json(steps.run.record(block), record.to_json(), guard=steps.lock.assert_held)
            steps.progress.block_done(block, block_error(record))

        self.persist(f"block {block}", solve_and_commit)

    def _on_outputs(self, name: str, make: Callable[[Any], Call[T]]) -> list[Outcome[T]]:
        """A phase on the outputs of the last block, which are made if they are not there."""

        def work(_: Failures) -> list[Outcome[T]]:
            shards, _observed = self.steps.inputs(self._last)
            self.steps.progress.phase(name)
            return self.steps.on_all(make(shards))

        return self.persist("the evaluation", work)

    def _put_right(self, what: str, broken: _Broken, failures: Failures) -> None:
        """What must be done before the next attempt; what was done is not done again."""
        if broken.workers:
            self._recover(what)
            broken.workers = False
            if self.steps.scratch:
                # Another node's scratch is another one.
                self._repairs(failures).mend_inputs()
        if broken.file is not None:
            if not self._repairs(failures).mend(hashed=True):
                raise broken.file
            broken.file = None

    def _repairs(self, failures: Failures) -> Repairs:
        return Repairs(self.steps, self.begun, self.manifest, self.mend_tokens, failures)

    def _recover(self, what: str) -> None:
        began, executor = time.perf_counter(), self.steps.executor
        executor.recover()
        seconds = time.perf_counter() - began
        self.steps.progress.note(
            f"{what}: {executor.world} workers are ready again after {seconds:.1f} s"
        )

    def _given_up(self, what: str, error: Prox24Error, history: AttemptHistory) -> Prox24Error:
        kind = type(error) if isinstance(error, WorkerMemoryError) else Prox24Error
        run = self.steps.run
        return kind(
            f"{what} failed {len(history.failures)} times ({history.summary()}); "
            f"{len(run.committed_blocks())} of {self.steps.blocks} blocks are committed in "
            f"{run.path} and kept: run the same command again to go on"
        )


@dataclass
class _Broken:
    """What an attempt left broken: workers that are gone, a file that is damaged."""

    workers: bool = False
    file: CorruptFileError | None = None


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Notes at which work an unexpected error came up."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, Prox24Error):
            error.add_note(f"({what})")
        raise
