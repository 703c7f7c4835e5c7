"""One rank of a job: what a Ray worker or the in-process executor does in each phase.

A rank keeps nothing between phases that it could not compute again from the run directory, but
one thing: the statistics between `calibrate` and `solve`. A lost rank therefore costs one block.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.capture import BlockCall, LayerGroup, ModelEnds, find_groups
from pipeline.collective import Collective
from pipeline.layers import layers_to_prune
from pipeline.measure import Stopwatch, peak_memory
from pipeline.model import Skeleton, open_skeleton
from pipeline.solvers import Solution, SolverSettings, Statistics, objective, solver_for
from pipeline.solvers.types import percentage
from pipeline.split import batch_ranges, even_range, row_ranges, shard_ranges
from pipeline.statistics import Accumulator
from storage.arrow_store import open_activation_shard, read_tokens, write_activation_shard
from storage.checkpoints import BlockRecord, RowSlice, read_layer, verify_record, write_row_slices
from storage.commit import StoredFile
from storage.errors import ModelError, NumericalError
from storage.model_files import WeightFileFingerprint, fingerprint_weight_file
from storage.output import write_weight_file
from storage.run_directory import RunDirectory


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank is told at its start. Paths are seen by all nodes."""

    source: str
    run_directory: str
    settings: SolverSettings | None
    nsamples: int
    seqlen: int
    batch_size: int
    dtype: str | None
    device: str | None
    threads: int
    skip_unsupported: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class Outcome:
    """A phase's result on one rank, with its seconds by kind and its peak memory in bytes."""

    value: Any
    seconds: dict[str, float]
    memory: dict[str, Any]


@dataclass(frozen=True)
class SolvedSlices:
    """One rank's row slices of a block: the file (None if it had no rows) and a report each."""

    file: StoredFile | None
    ranges: dict[str, tuple[int, int]]
    reports: dict[str, dict[str, Any]]


def choose_device(name: str | None) -> torch.device:
    """The device that `--device` names; by default the GPU where there is one."""
    if name is not None:
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_deterministic(threads: int) -> None:
    """Fixes what lets equal inputs give unequal bytes: thread count and kernel choice."""
    # Read by cuBLAS when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


class BlockWorker:
    """One rank. `perform` runs a phase by name; the phases are the public methods below it."""

    def __init__(self, job: Job, rank: int, world: int) -> None:
        make_deterministic(job.threads)
        self.job, self.rank, self.world = job, rank, world
        self.device = choose_device(job.device)
        self.run = RunDirectory(Path(job.run_directory))
        self.skeleton: Skeleton = open_skeleton(
            Path(job.source), dtype=job.dtype, trust_remote_code=job.trust_remote_code
        )
        self.watch = Stopwatch(self.device)
        self.collective: Collective | None = None
        self.statistics: dict[str, Statistics] = {}
        self._groups: dict[tuple[Any, ...], tuple[LayerGroup, ...]] = {}
        self._block_groups: tuple[LayerGroup, ...] = ()
        self._calls: dict[int, list[BlockCall]] = {}
        self._tokens: Tensor | None = None

    @torch.no_grad()
    def perform(self, phase: str, *arguments: Any) -> Outcome:
        """Runs the phase method of that name; the caller gets its value, time and memory."""
        with self.watch("other"):
            method: Callable[..., Any] = getattr(self, phase)
            value = method(*arguments)
        return Outcome(value, self.watch.take(), peak_memory(self.device))

    # -- phases -----------------------------------------------------------------------------

    def fingerprint(self, files: list[str]) -> list[WeightFileFingerprint]:
        """Hashes whole weight files and refuses NaN or Inf in them, each file read once."""
        with self.watch("load"):
            return [fingerprint_weight_file(self.skeleton.files.folder, file) for file in files]

    def embed(self, stamp: str) -> list[StoredFile]:
        """Writes this rank's activation shards of block 0: the embedded tokens."""
        with self.watch("load"):
            ends = ModelEnds(self.skeleton, self.device, head=False)
        stored = []
        for index, (start, stop) in self._own_shards():
            batches = self._embedded(ends, start, stop)
            with self.watch("io"):
                stored.append(self._write_shard(0, index, stamp, batches))
        return stored

    def calibrate(self, block: int, shards: list[StoredFile]) -> list[LayerGroup]:
        """Runs the dense block over this rank's shards, keeping its groups' partial sums."""
        settings = self._settings()
        with self.watch("load"):
            module = self.skeleton.load_block(block, self.device)
        layers = tuple(layers_to_prune(self.skeleton, block, settings, self.job.skip_unsupported))
        groups = self._find_groups(block, module, layers, shards)
        needs = solver_for(settings).needs
        sums = {g.name: Accumulator(g.columns, needs, self.device) for g in groups}
        handles = [self._observe(module, group, sums[group.name]) for group in groups]
        for hidden_states in self._own_batches(block, shards):
            with self.watch("forward"):
                self._call(block, hidden_states).run(module, hidden_states)
        for handle in handles:
            handle.remove()
        with self.watch("hessian"):
            self.statistics = {name: total.statistics() for name, total in sums.items()}
        self._block_groups = groups
        return list(groups)

    def reduce(self) -> None:
        """Sums the statistics over all ranks, in place."""
        if self.collective is None:
            return
        with self.watch("reduce"):
            for name, own in self.statistics.items():
                self.statistics[name] = self.collective.sum_statistics(own)

    def solve(self, block: int, stamp: str) -> SolvedSlices:
        """Solves this rank's rows of the block's layers and writes them to one file."""
        settings = self._settings()
        solver = solver_for(settings)
        names = layers_to_prune(self.skeleton, block, settings, self.job.skip_unsupported)
        ranges = row_ranges(names, self.rank, self.world, separable=solver.separable)
        groups = self._block_groups or tuple(LayerGroup((n,), names[n][1]) for n in names)
        slices: dict[str, RowSlice] = {}
        reports: dict[str, dict[str, Any]] = {}
        for group in groups:
            mine = {layer: ranges[layer] for layer in group.layers if layer in ranges}
            if not mine:
                continue
            for layer, rows, report in self._solve_group(block, group, mine, solver):
                slices[layer], reports[layer] = rows, report
            self.statistics.pop(group.name, None)
        self.statistics = {}
        self._collect()
        stored = None
        if slices:
            path = self.run.checkpoints(block) / f"rank-{self.rank}.{stamp}.safetensors"
            with self.watch("io"):
                stored = write_row_slices(path, slices)
        return SolvedSlices(stored, ranges, reports)

    def propagate(
        self, block: int, record: BlockRecord | None, shards: list[StoredFile], stamp: str
    ) -> list[StoredFile]:
        """Runs the block, pruned as `record` says (None: dense), and writes the next inputs."""
        with self.watch("load"):
            module = self.skeleton.load_block(block, self.device)
            if record is not None:
                self._insert_pruned(block, module, record)
        stored = []
        for index, _ in self._own_shards():
            batches = self._outputs(block, module, shards[index])
            with self.watch("io"):
                stored.append(self._write_shard(block + 1, index, stamp, batches))
        return stored

    def write_output(
        self, files: list[str], records: list[BlockRecord], folder: str
    ) -> list[StoredFile]:
        """Rewrites source weight files into `folder` with the pruned tensors in place."""
        owners = {
            self.skeleton.weight_name(record.block, layer): (record, layer)
            for record in records
            for layer in record.layers
        }

        verified: set[int] = set()

        def replacement(name: str) -> Iterable[Tensor] | None:
            if name not in owners:
                return None
            record, layer = owners[name]
            directory = self.run.checkpoints(record.block)
            if record.block not in verified:
                verify_record(directory, record)
                verified.add(record.block)
            return [read_layer(directory, record, layer, verify=False)]

        with self.watch("io"):
            return [
                write_weight_file(self.skeleton.files, file, Path(folder) / file, replacement)
                for file in files
            ]

    def losses(self, block: int, shards: list[StoredFile]) -> list[float]:
        """Summed next-token loss (nats) of each of this rank's sequences, in order.

        `shards` are the outputs of the last block, stored as the inputs of `block`.
        """
        with self.watch("load"):
            ends = ModelEnds(self.skeleton, self.device, head=True)
        sums = []
        for index, (start, _) in self._own_shards():
            for offset, hidden_states in enumerate(self._read_batches(block, shards[index], 1)):
                tokens = self._all_tokens()[start + offset][None].to(self.device)
                with self.watch("forward"):
                    logits = ends.logits(tokens, hidden_states)
                    loss = nn.functional.cross_entropy(
                        logits[0, :-1].float(), tokens[0, 1:], reduction="none"
                    )
                    sums.append(float(loss.double().sum()))
        return sums

    def forget(self) -> None:
        """Drops what an abandoned attempt left in memory."""
        self.statistics = {}
        self._collect()

    # -- pieces -----------------------------------------------------------------------------

    def _settings(self) -> SolverSettings:
        if self.job.settings is None:
            raise ModelError("this job evaluates; it has no solver")
        return self.job.settings

    def _all_tokens(self) -> Tensor:
        if self._tokens is None:
            self._tokens = read_tokens(self.run.tokens())
        return self._tokens

    def _own_shards(self) -> list[tuple[int, tuple[int, int]]]:
        """(index, range of sequences) of the activation shards that are this rank's."""
        ranges = shard_ranges(self.job.nsamples, self.job.batch_size)
        start, stop = even_range(len(ranges), self.rank, self.world)
        return [(index, ranges[index]) for index in range(start, stop)]

    def _embedded(self, ends: ModelEnds, start: int, stop: int) -> Iterator[Tensor]:
        for first, last in batch_ranges(stop - start, self.job.batch_size):
            with self.watch("forward"):
                hidden_states = ends.embed(self._all_tokens()[start + first : start + last])
            yield _finite(hidden_states, "the embeddings").cpu()

    def _outputs(self, block: int, module: nn.Module, stored: StoredFile) -> Iterator[Tensor]:
        for hidden_states in self._read_batches(block, stored, self.job.batch_size):
            with self.watch("forward"):
                output = self._call(block, hidden_states).run(module, hidden_states)
            yield _finite(output, f"block {block}").cpu()

    def _own_batches(self, block: int, shards: list[StoredFile]) -> Iterator[Tensor]:
        for index, _ in self._own_shards():
            yield from self._read_batches(block, shards[index], self.job.batch_size)

    def _read_batches(self, block: int, stored: StoredFile, batch_size: int) -> Iterator[Tensor]:
        """The shard's batches `(n, seqlen, hidden)` on the device; a model may write to them."""
        path = self.run.activations(block) / stored.name
        with self.watch("io"):
            shard = open_activation_shard(path, sha256=stored.sha256)
        with shard:
            for start, stop in batch_ranges(shard.rows, batch_size):
                with self.watch("io"):
                    # The map is read-only, and some models add to their input in place.
                    batch = shard.read(start, stop).to(self.device, copy=True)
                yield batch

    def _write_shard(
        self, block: int, index: int, stamp: str, batches: Iterable[Tensor]
    ) -> StoredFile:
        path = self.run.activations(block) / f"shard-{index:05d}.{stamp}.arrow"
        return write_activation_shard(path, batches, block=block, index=index)

    def _call(self, block: int, hidden_states: Tensor) -> BlockCall:
        """What the block is called with for batches of this size, learnt once for each size."""
        size = hidden_states.shape[0]
        if size not in self._calls:
            with self.watch("load"):
                ends = ModelEnds(self.skeleton, self.device, head=False)
                self._calls[size] = ends.calls(self._all_tokens()[:size])
        return self._calls[size][block]

    def _find_groups(
        self, block: int, module: nn.Module, layers: tuple[str, ...], shards: list[StoredFile]
    ) -> tuple[LayerGroup, ...]:
        """The block's groups; blocks of the same modules share one look at a forward."""
        structure = (str(module), layers)
        if structure not in self._groups:
            # Shard 0 serves every rank: one without sequences of its own must know the groups too.
            first = next(iter(self._read_batches(block, shards[0], 1)))
            self._groups[structure] = find_groups(module, self._call(block, first), first, layers)
        return self._groups[structure]

    def _observe(self, module: nn.Module, group: LayerGroup, total: Accumulator) -> Any:
        """Sums the inputs of the group's first layer: the others are called with the same."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            with self.watch("hessian"):
                inputs = args[0] if args else kwargs["input"]
                total.add(inputs, sequences=inputs.shape[0] if inputs.dim() > 2 else 1)

        return module.get_submodule(group.name).register_forward_pre_hook(hook, with_kwargs=True)

    def _solve_group(
        self, block: int, group: LayerGroup, mine: dict[str, tuple[int, int]], solver: Any
    ) -> Iterator[tuple[str, RowSlice, dict[str, Any]]]:
        statistics = self.statistics.get(group.name)
        weights = {}
        with self.watch("load"):
            for layer, rows in mine.items():
                name = self.skeleton.weight_name(block, layer)
                weights[layer] = self.skeleton.files.read(name, rows=rows).to(self.device)
        with self.watch("solve"):
            try:
                solved = solver.solve_group(weights, solver.prepare(statistics))
            except NumericalError as error:
                raise NumericalError(f"block {block}: {error}") from error
            for layer, solution in solved.items():
                stored, report = _as_stored(solution, weights[layer], statistics)
                yield layer, RowSlice(mine[layer][0], stored), report

    def _insert_pruned(self, block: int, module: nn.Module, record: BlockRecord) -> None:
        verify_record(self.run.checkpoints(block), record)
        for layer in record.layers:
            weight = read_layer(self.run.checkpoints(block), record, layer, verify=False)
            owner = module.get_submodule(layer)
            owner.weight = nn.Parameter(
                weight.to(device=self.device, dtype=self.skeleton.dtype), requires_grad=False
            )

    def _collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _as_stored(
    solution: Solution, weight: Tensor, statistics: Statistics | None
) -> tuple[Tensor, dict[str, Any]]:
    """The rows in the dtype they are stored in (on the CPU), and the report of exactly those."""
    stored = solution.weight.to(weight.dtype)
    report = solution.report
    if stored.dtype != solution.weight.dtype and statistics is not None:
        # Rounding to the stored dtype is part of the error that the user gets.
        lost = float(objective(stored, weight, statistics).sum())
        report = dataclasses.replace(
            report, objective=lost, relative_error=percentage(lost, report.objective_zero)
        )
    return stored.cpu(), report.to_json()


def _finite(hidden_states: Tensor, where: str) -> Tensor:
    if not bool(torch.isfinite(hidden_states).all()):
        dtype = str(hidden_states.dtype).removeprefix("torch.")
        raise NumericalError(
            f"the output of {where} is not finite in {dtype}; try --dtype float32 or bfloat16"
        )
    return hidden_states
