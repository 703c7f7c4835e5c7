"""One rank of a job: its work in each phase, in a Ray worker or in the driver's process.

Between phases a rank keeps only what it can compute again from the run directory, except the
statistics between `calibrate` and `solve`. So a lost rank costs one block at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pipeline.config.runtime import how_to_open
from pipeline.config.solver import AUTO, SolverSettings
from pipeline.loop.rank import Call, Rank
from pipeline.messages import Advanced, Job, Observed, Outcome, SolvedSlices
from pipeline.models.experts import send_every_token
from pipeline.models.forward_capture import LayerGroup, ModelEnds, find_groups
from pipeline.models.linears import linear_layers
from pipeline.models.selection import settings_of
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
from pipeline.runtime.out_of_memory import explaining
from pipeline.runtime.split import deal, in_passes
from pipeline.runtime.stopwatch import Stopwatch, peak_memory
from pipeline.solvers.auto_shrinkage import choose_regularization
from pipeline.solvers.registry import solver_for
from pipeline.statistics.accumulate import HalvedStatistics, HalvedSums, merged, statistics_bytes
from pipeline.statistics.all_reduce import Collective
from pipeline.statistics.observer import BlockObserver, accumulators
from pipeline.worker.block_loader import BlockLoader
from pipeline.worker.few_tokens import least_tokens
from pipeline.worker.forward import Forward
from pipeline.worker.saved_layers import save_layer, saved_layers
from pipeline.worker.scoring import Scoring
from pipeline.worker.scratch_phases import ScratchPhases
from pipeline.worker.solve import TOO_FEW_TOKENS, deal_rows, solve_group, split_groups
from storage.errors import ModelError, NumericalError
from storage.files.hashing import StoredFile
from storage.model.files import WeightFileFingerprint, fingerprint_weight_file
from storage.object_store import place
from storage.output.weight_files import Sending, write_files
from storage.run.checkpoints import BlockRecord, RowSlice, write_row_slices
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


@dataclass(frozen=True)
class PassState:
    """What a rank keeps between the phases of a pass over a block's inputs; all else is dropped.

    groups: the pass's groups of layers. sums: group → sums over this rank's sequences, from
    `calibrate` until `reduce`. statistics: group → statistics over all ranks' sequences, from
    `reduce` until `solve`.
    """

    groups: tuple[LayerGroup, ...] = ()
    sums: dict[str, HalvedSums] = field(default_factory=dict)
    statistics: dict[str, HalvedStatistics] = field(default_factory=dict)


class BlockWorker(Scoring, ScratchPhases):
    """One rank, as `pipeline.loop.rank.Rank` describes it."""

    def __init__(self, job: Job, rank: int, world: int) -> None:
        make_deterministic(job.threads)
        self.job, self.rank, self.world = job, rank, world
        self.device = choose_device(job.device)
        self.run = RunDirectory(Path(job.run_directory))
        self.skeleton: Skeleton = open_skeleton(place(job.source), **how_to_open(job))
        self.watch = Stopwatch(self.device, trace=job.trace)
        self.forward = Forward(job, rank, world, self.skeleton, self.watch)
        self.collective: Collective | None = None
        self.state = PassState()
        self._groups: dict[tuple[Any, ...], tuple[LayerGroup, ...]] = {}
        self.loader = BlockLoader(self.skeleton, self.run, self.watch, self.forward.background)

    @torch.no_grad()
    def perform(self, phase: Call[T]) -> Outcome[T]:
        """Runs the phase; returns its result with times and peak memory."""
        start, began = time.time(), time.perf_counter()
        method: Callable[..., T] = getattr(self, phase.phase)
        with explaining(phase.phase, phase.block), self.watch("other"):
            if phase.phase not in _WITHOUT_SOURCE:
                self._expect_source()
            value = method(*phase.arguments)
        events = self.watch.take_events()
        if self.job.trace:
            events = (("", start, time.perf_counter() - began), *events)
        seconds, counts = self.watch.take(), self.watch.take_counts()
        return Outcome(value, seconds, peak_memory(self.device), events, counts)

    # -- phases -----------------------------------------------------------------------------

    def fingerprint(self, files: list[str]) -> list[WeightFileFingerprint]:
        """Hashes whole weight files, reading each once. Raises `ModelError` for NaN or Inf."""
        with self.watch("load"):
            source, loaded = self.skeleton.files.source, self.skeleton.loaded
            return [fingerprint_weight_file(source, file, loaded) for file in files]

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
        self.state = PassState(groups, observer.sums())
        return observed

    def reduce(self) -> None:
        """Sums the partial sums over all ranks and makes statistics of them, group by group."""
        for name in list(self.state.sums):
            halves = self.state.sums.pop(name)
            if self.collective is not None:
                with self.watch("reduce"):
                    halves = tuple(self.collective.sum_statistics(half) for half in halves)
            with self.watch("hessian"):
                self.state.statistics[name] = tuple(half.statistics() for half in halves)
        if self.collective is not None:
            sent, self.collective.sent = self.collective.sent, 0
            self.watch.count("statistics_sent_bytes", sent)

    def groups_held(self) -> tuple[LayerGroup, ...]:
        """The groups whose statistics are in memory: the same on every rank."""
        return self.state.groups

    def choose(self, block: int) -> dict[str, dict[str, Any]]:
        """Chooses the regularization of this rank's share of groups: group → settings as JSON.

        The entry is empty for a group whose method (`--override`) leaves nothing to choose.
        """
        cost = {group.name: float(group.columns) ** 3 for group in self.state.groups}
        owners = deal(list(cost), cost, self.world)
        choices: dict[str, dict[str, Any]] = {}
        layer_settings = self._settings(block)
        module = self.skeleton.blocks[block]
        for group in (group for group in self.state.groups if owners[group.name] == self.rank):
            settings = layer_settings[group.name]
            if settings.shrinkage != AUTO or solver_for(settings).needs != "full":
                choices[group.name] = {}
                continue
            first, second = self.state.statistics[group.name]
            least = least_tokens(module, group.layers, self.job.expert_tokens)
            if min(first.tokens, second.tokens) < least:
                choices[group.name] = TOO_FEW_TOKENS
                continue
            weights = {layer: self._read_weight(block, layer) for layer in group.layers}
            with self.watch("choose"):
                choice = choose_regularization(weights, (first, second), settings)
            choices[group.name] = choice.to_json()
        return choices

    def solve(
        self, block: int, stamp: str, choices: dict[str, dict[str, Any]] | None
    ) -> SolvedSlices:
        """Solves this rank's rows of the pass's layers and writes them to one file.

        choices: what `choose` returned, for all groups; None if nothing is chosen.
        Raises `NumericalError`, naming block and layer, for NaN or Inf.
        """
        settings = self._settings(block)
        if self.state.statistics and block + 1 < len(self.skeleton.blocks):
            self.loader.ahead(block + 1)
        shapes = linear_layers(self.skeleton.blocks[block])
        # Without statistics (magnitude) nothing was observed: each layer is a group.
        groups = self.state.groups or tuple(LayerGroup((n,), shapes[n][1]) for n in settings)
        ranges = deal_rows(settings, groups, shapes, self.world)[self.rank]
        slices: dict[str, RowSlice] = {}
        reports: dict[str, dict[str, Any]] = {}
        costs: dict[str, dict[str, float]] = {}
        for group in groups:
            self._save_layers(block, group)
            rows = {layer: ranges[layer] for layer in group.layers if layer in ranges}
            halves = self.state.statistics.pop(group.name, ())
            if not rows:
                continue
            choice = choices.get(group.name) if choices is not None else None
            began = time.perf_counter()
            solved = self._solve_group(block, settings[group.name], rows, halves, choice)
            costs[group.name] = {
                "seconds": time.perf_counter() - began,
                **peak_memory(self.device),
            }
            for layer, (stored, report) in solved.items():
                slices[layer] = RowSlice(rows[layer][0], stored)
                self.watch.count("solved_weights", stored.numel())
                reports[layer] = report
        self.forget()
        if not slices:
            return SolvedSlices(None, ranges, reports, costs)
        path = self.run.checkpoints(block) / f"rank-{self.rank}.{stamp}.safetensors"
        require_owner(self.job.lock_file)
        with self.watch("io"):
            file = write_row_slices(path, slices)
        self.watch.count("slices_written_bytes", file.bytes)
        return SolvedSlices(file, ranges, reports, costs)

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
        self.state = PassState(groups, observer.sums())
        return Advanced(written, observed)

    def write_output(
        self, files: list[str], records: list[BlockRecord], folder: str
    ) -> list[StoredFile]:
        """Rewrites source weight files into `folder`, a path or URI, with the pruned tensors."""
        replacement = Replacements(self.skeleton, self.run, records)
        sending = Sending(self.run.uploads(), records, partial(require_owner, self.job.lock_file))
        with self.watch("io"):
            return write_files(self.skeleton.files, files, place(folder), replacement, sending)

    def forget(self) -> None:
        """Drops the statistics of an abandoned attempt or of a solved block."""
        self.state = PassState()

    # -- parts of these ---------------------------------------------------------------------

    def _expect_source(self) -> None:
        """Has every source tensor compared with its hash in `run.json` when it is read."""
        if self.job.rules is not None and not self.skeleton.files.expected:
            expect_source(self.run, self.skeleton.files)

    def _settings(self, block: int) -> dict[str, SolverSettings]:
        """Layer, by its path in the block → its settings, for the block's pruned layers."""
        if self.job.rules is None:
            raise ModelError("this job evaluates; it has no solver")
        return settings_of(self.skeleton, block, self.job.rules)

    def _observer(
        self, block: int, first: Callable[[], Tensor], limit: float | None, number: int
    ) -> tuple[BlockObserver, Observed, tuple[LayerGroup, ...]]:
        """An observer of the dense block for pass `number`, all groups, and the pass's groups."""
        settings = self._settings(block)
        module = self.loader.dense(block)
        if self.job.all_experts:
            send_every_token(module)
        groups = self._find_groups(block, module, settings, first)
        # --shrinkage auto fits on one half of the sequences and judges on the other.
        halves = 2 if any(each.shrinkage == AUTO for each in settings.values()) else 1
        needs = {group: self._needs(block, group, settings) for group in groups}
        sizes = {group: halves * statistics_bytes(group.columns, needs[group]) for group in groups}
        passes = in_passes(sizes, limit)
        pass_groups = tuple(passes[number])
        boundary = self.job.nsamples // 2 if halves == 2 else None
        sums = accumulators(module, pass_groups, needs, self.device, boundary)
        observer = BlockObserver(module, sums, partial(self.forward.call, block), self.watch)
        return observer, Observed(groups, len(passes)), pass_groups

    def _needs(self, block: int, group: LayerGroup, settings: dict[str, SolverSettings]) -> str:
        """The statistic that a group needs: "none", "diagonal" or "full"."""
        prefix = self.skeleton.block_prefix(block)
        saved = saved_layers(self.job.save_layers, prefix, group.layers)
        return "full" if saved else solver_for(settings[group.name]).needs

    def _find_groups(
        self,
        block: int,
        module: nn.Module,
        settings: dict[str, SolverSettings],
        first: Callable[[], Tensor],
    ) -> tuple[LayerGroup, ...]:
        """The block's groups, from a forward pass of `first()`; cached for blocks of equal modules.

        Every rank uses the first sequences: a rank without any must know the groups too. A group
        whose layers differ in settings is split, so that each part has the statistics it needs.
        """
        structure = (str(module), *settings.items())
        if structure not in self._groups:
            batch = first()
            call = self.forward.call(block, batch)
            groups = find_groups(module, call, batch, tuple(settings))
            self._groups[structure] = split_groups(groups, settings)
        return self._groups[structure]

    def _solve_group(
        self,
        block: int,
        settings: SolverSettings,
        rows: dict[str, tuple[int, int]],
        halves: HalvedStatistics,
        choice: dict[str, Any] | None,
    ) -> dict[str, tuple[Tensor, dict[str, Any]]]:
        """Layer → its solved rows and their report; see `pipeline.worker.solve.solve_group`."""
        weights = {layer: self._read_weight(block, layer, part) for layer, part in rows.items()}
        with self.watch("solve"):
            try:
                least = least_tokens(self.skeleton.blocks[block], rows, self.job.expert_tokens)
                return solve_group(weights, merged(halves), settings, choice, least)
            except NumericalError as error:
                raise NumericalError(f"block {block}: {error}") from error

    def _read_weight(self, block: int, layer: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A layer's weight (R, C), or its rows start:stop, in the stored dtype on the device."""
        with self.watch("load"):
            weight = self.skeleton.read_weight(block, layer, rows).to(self.device)
        self.watch.count("weights_read_bytes", weight.nbytes)
        return weight

    def _save_layers(self, block: int, group: LayerGroup) -> None:
        """On rank 0, writes the group's layers that `--save-layers` names."""
        if self.rank or group.name not in self.state.statistics:
            return
        prefix, halves = self.skeleton.block_prefix(block), self.state.statistics[group.name]
        for layer in saved_layers(self.job.save_layers, prefix, group.layers):
            with self.watch("io"):
                weight = self._read_weight(block, layer)
                save_layer(self.job, self.run, prefix + layer, weight, halves)
