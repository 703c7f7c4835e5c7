"""One rank of a job: its work in each phase, in a Ray worker or in the driver's process.

Between phases a rank keeps only what it can compute again from the run directory, except the
statistics between `calibrate` and `solve`. So a lost rank costs one block at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.config.runtime import how_to_open
from pipeline.config.solver import AUTO, SolverSettings
from pipeline.loop.rank import Call, Rank
from pipeline.messages import Advanced, Job, Observed, Outcome
from pipeline.models.experts import send_every_token
from pipeline.models.forward_capture import LayerGroup, ModelEnds
from pipeline.models.skeleton import Skeleton, open_skeleton
from pipeline.output.replacements import Replacements
from pipeline.records.manifest import expect_source
from pipeline.runtime.device import (
    FreeMemory,
    choose_device,
    free_memory_on,
    make_deterministic,
    statistics_room,
)
from pipeline.runtime.device_errors import explaining
from pipeline.runtime.split import in_passes
from pipeline.runtime.stopwatch import Stopwatch, peak_memory
from pipeline.solvers.kernels.on_gpu import trial_launch
from pipeline.solvers.registry import solver_for, uses_triton
from pipeline.statistics.accumulate import (
    HalvedSums,
    not_finite_sums,
    statistics_bytes,
)
from pipeline.statistics.all_reduce import Collective
from pipeline.statistics.observer import BlockObserver, accumulators
from pipeline.worker.block_loader import BlockLoader
from pipeline.worker.forward import Forward
from pipeline.worker.groups import Groups
from pipeline.worker.saved_layers import saved_layers
from pipeline.worker.scoring import Scoring
from pipeline.worker.scratch_phases import ScratchPhases
from pipeline.worker.solve_phases import PassState, SolvePhases
from pipeline.worker.training.phases import TrainingPhases
from storage.files.hashing import StoredFile
from storage.files.os_errors import file_errors
from storage.model.files import WeightFileFingerprint, fingerprint_weight_file
from storage.object_store import place
from storage.output.weight_files import Sending, write_files
from storage.run.checkpoints import BlockRecord
from storage.run.directory import RunDirectory
from storage.run.lock import require_owner

T = TypeVar("T")

# Phases that run before `run.json` has the hashes of the source's tensors, or read none of them.
_WITHOUT_SOURCE = frozenset(
    phase.__name__
    for phase in (
        Rank.fingerprint,
        Rank.free_memory,
        Rank.free_scratch,
        Rank.damaged_shards,
        Rank.drop_shards,
        Rank.sweep_scratch,
        Rank.clear_scratch,
    )
)


class BlockWorker(SolvePhases, TrainingPhases, Scoring, ScratchPhases):
    """One rank, as `pipeline.loop.rank.Rank` describes it."""

    def __init__(self, job: Job, rank: int, world: int) -> None:
        make_deterministic(job.threads)
        self.job, self.rank, self.world = job, rank, world
        self.device = choose_device(job.device)
        if self.device.type == "cuda" and job.rules is not None:
            needs_triton = any(map(uses_triton, job.rules.all_settings()))
            if needs_triton:  # better now than in the first solve
                trial_launch(self.device)
        self.run = RunDirectory(Path(job.run_directory))
        self.skeleton: Skeleton = open_skeleton(place(job.source), **how_to_open(job))
        self.watch = Stopwatch(self.device, trace=job.trace)
        self.forward = Forward(job, rank, world, self.skeleton, self.watch)
        self.collective: Collective | None = None
        self.state = PassState()
        self._groups = Groups(self.forward)
        self.loader = BlockLoader(self.run, self.forward)

    @torch.no_grad()
    def perform(self, phase: Call[T]) -> Outcome[T]:
        """Runs the phase; returns its result with times and peak memory.

        Raises a FileError, made here where the file is, for one that cannot be used.
        """
        start, began = time.time(), time.perf_counter()
        method: Callable[..., T] = getattr(self, phase.phase)
        explained = explaining(phase.phase, phase.block, self.device)
        with explained, file_errors(), self.watch("other"):
            if phase.phase not in _WITHOUT_SOURCE:
                self._expect_source()
            value = method(*phase.arguments)
        events = self.watch.take_events()
        if self.job.trace:
            events = (("", start, time.perf_counter() - began), *events)
        seconds, counts = self.watch.take(), self.watch.take_counts()
        return Outcome(value, seconds, peak_memory(self.device), events, counts)

    def forget(self) -> None:
        """Drops what is kept between the phases of a block."""
        super().forget()
        self.training = self.calibrated = None

    # -- phases -----------------------------------------------------------------------------

    def fingerprint(self, files: list[str]) -> list[WeightFileFingerprint]:
        """Hashes whole weight files, reading each once, several at a time.

        Raises `ModelError` for NaN or Inf.
        """
        source, loaded = self.skeleton.files.source, self.skeleton.loaded

        def fingerprint(file: str) -> WeightFileFingerprint:
            return fingerprint_weight_file(source, file, loaded)

        with self.watch("load"):
            threads = self.forward.writing
            return list(threads.ahead(fingerprint, files, threads.threads))

    def embed(self, stamp: str, only: Sequence[int] | None = None) -> list[StoredFile]:
        """Writes this rank's activation shards of the embedded tokens; `only`: some, by number."""
        with self.watch("load"):
            ends = ModelEnds(self.skeleton, self.device, head=False)
        return self.forward.write(0, stamp, self.forward.embedded(ends, only))

    def hessian_memory(self) -> float | None:
        """Bytes of statistics that this rank's device should hold at once; None: no limit."""
        return statistics_room(self.device)

    def free_memory(self) -> FreeMemory:
        """Free memory of this rank's node and GPU."""
        return free_memory_on(self.device)

    def calibrate(
        self, block: int, shards: list[StoredFile], limit: float | None = None, number: int = 0
    ) -> Observed:
        """Runs the dense block over this rank's activation shards; keeps its groups' partial sums.

        If the block's statistics exceed `limit` bytes, its groups are divided over several passes,
        and this call takes those of pass `number`. Every rank must be given the same limit.
        """
        first = partial(self.forward.first_batch, block, shards)
        observer, observed, groups = self._observer(block, first, limit, number)
        for _, start, hidden_states in self.forward.rank_batches(block, shards):
            observer.add(start, hidden_states)
        again = (batch for _, _, batch in self.forward.rank_batches(block, shards))
        self.state = PassState(groups, self._sums(block, observer, groups, again))
        return observed

    def reduce(self) -> None:
        """Sums the partial sums over all ranks and makes statistics of them, group by group."""
        self.calibrated = None  # the targets are there: a solve needs the memory
        for name in list(self.state.sums):
            halves = self.state.sums.pop(name)
            if self.collective is not None:
                with self.watch("reduce"):
                    halves = tuple(self.collective.sum_statistics(half) for half in halves)
            with self.watch("hessian"):
                self.state.statistics[name] = tuple(half.statistics() for half in halves)
        if self.collective is not None:
            self.watch.count("statistics_sent_bytes", self.collective.take_sent())

    def groups_held(self) -> tuple[LayerGroup, ...]:
        """The groups whose statistics are in memory: the same on every rank."""
        return self.state.groups

    def propagate(
        self,
        block: int,
        record: BlockRecord | None,
        shards: Sequence[StoredFile] | Mapping[int, StoredFile],
        stamp: str,
        only: Sequence[int] | None = None,
    ) -> list[StoredFile]:
        """Runs the block, pruned as in `record` (None: dense), and writes the next inputs."""
        module = self.loader.pruned(block, record)
        outputs = (
            (index, self.forward.output(block, module, batch))
            for index, _, batch in self.forward.rank_batches(block, shards, only=only)
        )
        return self.forward.write(block + 1, stamp, outputs)

    def advance(
        self,
        block: int,
        record: BlockRecord | None,
        shards: list[StoredFile],
        stamp: str,
        limit: float | None = None,
    ) -> Advanced:
        """`propagate` of a block and `calibrate` of the next, in one pass over the shards.

        The statistics are summed over the bytes that are written, in the same batches, so they
        equal those of two separate passes bit for bit. Two blocks' weights are in memory.
        """
        module = self.loader.pruned(block, record)
        observer, observed, groups = self._observer(
            block + 1,
            lambda: self.forward.output(block, module, self.forward.first_batch(block, shards)),
            limit,
            number=0,
        )

        def outputs() -> Iterator[tuple[int, Tensor]]:
            for index, start, hidden_states in self.forward.rank_batches(block, shards):
                output = self.forward.output(block, module, hidden_states)
                yield index, output
                observer.add(start, output)

        written = self.forward.write(block + 1, stamp, outputs())
        again = (
            self.forward.output(block, module, batch)
            for _, _, batch in self.forward.rank_batches(block, shards)
        )
        self.state = PassState(groups, self._sums(block + 1, observer, groups, again))
        return Advanced(written, observed)

    def write_output(
        self, files: list[str], records: list[BlockRecord], folder: str
    ) -> list[StoredFile]:
        """Rewrites source weight files into `folder`, a path or URI, with the pruned tensors."""
        threads = self.forward.file_threads
        replacement = Replacements(self.skeleton, self.run, records, threads)
        sending = Sending(self.run.uploads(), records, partial(require_owner, self.job.lock_file))
        with self.watch("io"):
            return write_files(self.skeleton.files, files, place(folder), replacement, sending)

    # -- parts of these ---------------------------------------------------------------------

    def _expect_source(self) -> None:
        """Has every source tensor compared with its hash in `run.json` when it is read."""
        if self.job.rules is not None and not self.skeleton.files.expected:
            expect_source(self.run, self.skeleton.files)

    def _observer(
        self, block: int, first: Callable[[], Tensor], limit: float | None, number: int
    ) -> tuple[BlockObserver, Observed, tuple[LayerGroup, ...]]:
        """An observer of the dense block for pass `number`, all groups, and the pass's groups."""
        settings = self._settings(block)
        module = self.loader.dense(block)
        if self.job.all_experts:
            send_every_token(module)
        groups = self._groups.find(block, module, settings, first)
        # --shrinkage auto fits on one half of the sequences and judges on the other.
        halves = 2 if any(each.shrinkage == AUTO for each in settings.values()) else 1
        needs = {group: self._needs(block, group, settings) for group in groups}
        sizes = {group: halves * statistics_bytes(group.columns, needs[group]) for group in groups}
        passes = in_passes(sizes, limit)
        pass_groups = tuple(passes[number])
        boundary = self.forward.boundary() if halves == 2 else None
        sums = accumulators(module, pass_groups, needs, self.device, boundary)
        call = partial(self.forward.call, block)
        observer = BlockObserver(module, sums, call, self.watch, self.forward.counted())
        # Where every expert was sent every token, the block's outputs are others.
        again = self.job.reconstruct is not None and not self.job.all_experts
        self.calibrated = (block, module) if again else None
        return observer, Observed(groups, len(passes)), pass_groups

    def _sums(
        self,
        block: int,
        observer: BlockObserver,
        groups: Iterable[LayerGroup],
        again: Iterable[Tensor],
    ) -> dict[str, HalvedSums]:
        """The sums of a pass. again: its batches, for the error where a sum is not finite."""
        sums = observer.sums()
        if beyond := not_finite_sums(sums):
            layers = [layer for group in groups if group.name in beyond for layer in group.layers]
            raise self.forward.statistics_error(block, observer.module, layers, again)
        return sums

    def _needs(self, block: int, group: LayerGroup, settings: dict[str, SolverSettings]) -> str:
        """The statistic that a group needs: "none", "diagonal" or "full"."""
        prefix = self.skeleton.block_prefix(block)
        saved = saved_layers(self.job.save_layers, prefix, group.layers)
        return "full" if saved else solver_for(settings[group.name]).needs
