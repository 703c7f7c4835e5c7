"""The job to be planned: the model's shape, the settings, and the machines it would run on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from pipeline.config.reconstruct import Reconstruct
from pipeline.config.solver import AUTO, SolverSettings
from pipeline.models.forward_capture import LayerGroup
from pipeline.planning.counts import statistic_bytes, summed_bytes
from pipeline.planning.rates import Rates
from pipeline.planning.shapes.experts import most_sum_bytes
from pipeline.planning.shapes.model import BlockShape, GroupShape, ModelShape
from pipeline.runtime.background import FILE_THREADS
from pipeline.runtime.split import batch_ranges, deal, even_range, in_passes, shard_ranges
from pipeline.solvers.registry import solver_for
from pipeline.worker.few_tokens import simpler_settings
from pipeline.worker.solve import deal_rows, teams


class Share(NamedTuple):
    """How many rows of a group a worker solves, and how many workers compute its inverses together.

    team: 1 where each computes them alone.
    """

    group: GroupShape
    rows: int
    team: int


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """One job on one cluster.

    settings: resolved. rates: those of one worker. host_memory, disk: bytes of a node's memory and
    of free disk, None where unknown. device_memory: bytes of each worker's GPU, 0 on CPUs.
    in_process: the local executor, whose one process runs the workers one after another.
    hessian_memory: bytes of statistics that a worker may hold at once; None: half of a GPU's
    memory, no limit on a CPU. expert_tokens: as for `prune`. counted_share: of the calibration
    tokens, how many statistics are taken of. uneven: whether to plan for the most memory that any
    routing to experts can take, instead of for even shares of the tokens. reconstruct: how blocks
    are reconstructed, if at all. threads: CPU threads of a worker without a GPU.
    """

    shape: ModelShape
    settings: SolverSettings
    nsamples: int
    seqlen: int
    batch_size: int
    workers: int
    nodes: int
    rates: Rates
    host_memory: float | None = None
    device_memory: float = 0.0
    disk: float | None = None
    in_process: bool = False
    hessian_memory: float | None = None
    expert_tokens: int = 0
    counted_share: float = 1.0
    uneven: bool = False
    reconstruct: Reconstruct | None = None
    threads: int = 1

    @property
    def file_threads(self) -> int:
        """How many files a worker hashes at a time; a GPU is taken to have the cores for it."""
        return FILE_THREADS if self.rates.on_gpu else self.threads

    @property
    def per_node(self) -> int:
        """Workers on the fullest node."""
        return -(-self.workers // self.nodes)

    @cached_property
    def every(self) -> tuple[SolverSettings, ...]:
        """The settings of all layers, each once, those of the job first."""
        groups = (group for kind in self.shape.kinds for group in kind.groups)
        return (self.settings, *{g.override: None for g in groups if g.override is not None})

    @cached_property
    def calibrates(self) -> bool:
        """Whether any layer needs statistics of its inputs."""
        return any(solver_for(settings).needs != "none" for settings in self.every)

    @property
    def keeps_inputs(self) -> bool:
        """Whether there are activations at all."""
        return self.calibrates or self.reconstruct is not None

    @cached_property
    def halves(self) -> int:
        """2 where each half of the calibration has its statistics (`--shrinkage auto`); else 1."""
        return 2 if any(settings.shrinkage == AUTO for settings in self.every) else 1

    @cached_property
    def routes(self) -> bool:
        """Whether the memory depends on how tokens are routed to experts."""
        return any(group.active for kind in self.shape.kinds for group in kind.groups)

    @cached_property
    def shards(self) -> list[tuple[int, int]]:
        """The range of sequences of each activation shard."""
        return shard_ranges(self.nsamples, self.batch_size)

    @cached_property
    def busiest(self) -> tuple[int, int, int]:
        """Sequences, batches and activation shards of the worker with most sequences."""
        most = (0, 0, 0)
        for rank in range(self.workers):
            start, stop = even_range(len(self.shards), rank, self.workers)
            sizes = [last - first for first, last in self.shards[start:stop]]
            batches = sum(len(batch_ranges(rows, self.batch_size)) for rows in sizes)
            most = max(most, (sum(sizes), batches, len(sizes)))
        return most

    def settings_of(self, group: GroupShape) -> SolverSettings:
        """The settings that the job asks for in a group."""
        return group.override or self.settings

    def solved_with(self, group: GroupShape) -> SolverSettings:
        """The settings that a group is solved with: simpler ones for an expert with few tokens."""
        asked = self.settings_of(group)
        least = max(self.expert_tokens, 1) if group.kept and not self.uneven else 0
        return simpler_settings(asked, self.tokens(group), least) or asked

    def tokens(self, group: GroupShape) -> float:
        """Tokens that a group's statistics are taken of, over all workers; with uneven routing, the
        maximum."""
        share = 1.0 if self.uneven else group.share
        return share * self.counted_share * self.nsamples * self.seqlen

    def busiest_tokens(self, group: GroupShape) -> float:
        """The share of `tokens` on the busiest worker."""
        return self.tokens(group) * self.busiest[0] / self.nsamples

    def inputs(self, group: GroupShape) -> float | None:
        """The number of inputs kept in place of a group's Hessian; None where there is a matrix."""
        tokens = self.tokens(group)
        return tokens if group.kept and tokens < group.columns else None

    def statistics(self, groups: Iterable[GroupShape]) -> float:
        """Bytes of the statistics of groups on one worker."""
        tokens = self.counted_share * self.nsamples * self.seqlen
        return self._group_bytes(groups, tokens, statistic_bytes, 4)

    def sums(self, groups: Iterable[GroupShape]) -> float:
        """Bytes of the running sums of groups on one worker."""
        tokens = self.counted_share * self.busiest[0] * self.seqlen / self.halves
        return self._group_bytes(groups, tokens, summed_bytes, self.shape.forward_itemsize)

    def _group_bytes(
        self,
        groups: Iterable[GroupShape],
        tokens: float,
        whole: Callable[[SolverSettings, int, int], int],
        itemsize: int,
    ) -> float:
        """Bytes of statistics or sums.

        tokens: on the worker, before routing. whole: bytes with a matrix, from settings, columns
        and halves. itemsize: bytes of an element of a kept input.
        """
        total = 0.0
        for group, count in Counter(groups).items():
            settings, columns = self.settings_of(group), group.columns
            matrix = float(whole(settings, columns, self.halves))
            each = float(columns * itemsize)
            if not group.kept or solver_for(settings).needs != "full":
                total += count * matrix
            elif self.uneven and group.active:
                # The two halves are routed independently.
                half = matrix / self.halves
                one = most_sum_bytes(count, group.active, tokens, columns, half, each)
                total += self.halves * one
            else:
                share = group.share * tokens
                total += count * (matrix if share >= columns else self.halves * share * each)
        return total

    def counted(self, groups: Iterable[GroupShape]) -> float:
        """Bytes of the running sums of groups as `--hessian-memory` counts them.

        All count as matrices, also where inputs are kept instead.
        """
        return float(sum(summed_bytes(self.settings_of(g), g.columns, self.halves) for g in groups))

    def passes(self, block: BlockShape) -> list[BlockShape]:
        """The block once per pass over the calibration data, with the groups of that pass.

        There are as few passes as the memory for statistics allows.
        """
        limit = self.hessian_memory
        if limit is None and self.device_memory:
            limit = self.device_memory / 2
        if not self.calibrates:
            return [block]
        sizes = {number: self.counted([group]) for number, group in enumerate(block.groups)}
        return [
            replace(block, groups=tuple(block.groups[number] for number in numbers))
            for numbers in in_passes(sizes, limit)
        ]

    @property
    def largest_batch(self) -> int:
        """Sequences of the largest batch."""
        return min(self.batch_size, self.nsamples)

    @cached_property
    def busiest_files(self) -> list[float]:
        """Bytes of each weight file of the worker with most bytes of them."""
        sizes = dict(enumerate(map(float, self.shape.files)))
        owners = deal(list(sizes), sizes, self.workers)
        files: list[list[float]] = [[] for _ in range(self.workers)]
        for index, owner in owners.items():
            files[owner].append(sizes[index])
        return max(files, key=sum)

    def deal(self, block: BlockShape) -> list[list[Share]]:
        """For each worker, its shares of the block's groups, in the order in which it solves."""
        on_gpu = self.rates.on_gpu
        settings = tuple(map(self.settings_of, block.groups))
        nodes = self.nodes if on_gpu and not self.in_process else None
        return _deal(settings, block.groups, self.workers, "cuda" if on_gpu else "cpu", nodes)


@lru_cache(maxsize=256)
def _deal(
    settings: tuple[SolverSettings, ...],
    groups: tuple[GroupShape, ...],
    workers: int,
    device: str,
    nodes: int | None,
) -> list[list[Share]]:
    shapes: dict[str, tuple[int, int]] = {}
    chosen: dict[str, SolverSettings] = {}
    parts = []
    for number, group in enumerate(groups):
        layers = {f"{number}.{name}": (rows, columns) for name, rows, columns in group.layers}
        shapes |= layers
        chosen |= dict.fromkeys(layers, settings[number])
        parts.append(LayerGroup(tuple(layers), group.columns))
    workers_rows = []
    dealt = deal_rows(chosen, parts, shapes, workers, device, nodes)
    joint = teams(chosen, parts, shapes, dealt, device, nodes)
    for ranges in dealt:
        rows = [
            sum(stop - start for start, stop in (ranges.get(n, (0, 0)) for n in part.layers))
            for part in parts
        ]
        sizes = [len(joint.get(part.name, (0,))) for part in parts]
        shares = [Share(*each) for each in zip(groups, rows, sizes, strict=True)]
        workers_rows.append(sorted(shares, key=lambda share: share.team == 1))
    return workers_rows
