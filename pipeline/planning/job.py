"""What is planned: a model's shape, a job's settings, and the machines they would run on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from pipeline.planning.counts import summed_bytes
from pipeline.planning.rates import Rates
from pipeline.planning.shape import BlockShape, GroupShape, ModelShape
from pipeline.solvers import SolverSettings, solver_for
from pipeline.solvers.cost import solve_cost
from pipeline.split import (
    GroupRows,
    batch_ranges,
    deal,
    even_range,
    row_ranges,
    shard_ranges,
    turns,
    whole_layers,
)


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """One job on one cluster. `settings` are resolved; `rates` are those of one worker.

    hessian_memory: bytes of statistics that a worker may hold at once, None for half of a GPU's
    memory and for any number on a CPU. host_memory, disk: bytes of a node's memory and of free
    disk, None where unknown. device_memory: bytes of each worker's GPU, 0 on CPUs. in_process: the
    local executor, one process that runs rank after rank.
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

    @property
    def per_node(self) -> int:
        """Workers on the fullest node."""
        return -(-self.workers // self.nodes)

    @property
    def needs(self) -> str:
        """The statistic that the method asks for."""
        return solver_for(self.settings).needs

    @property
    def calibrates(self) -> bool:
        """Whether there are activations at all."""
        return self.needs != "none"

    @cached_property
    def shards(self) -> list[tuple[int, int]]:
        """Sequences of each activation shard."""
        return shard_ranges(self.nsamples, self.batch_size)

    @cached_property
    def busiest(self) -> tuple[int, int, int]:
        """Sequences, batches and activation shards of the rank that has most sequences."""
        found = (0, 0, 0)
        for rank in range(self.workers):
            start, stop = even_range(len(self.shards), rank, self.workers)
            own = [last - first for first, last in self.shards[start:stop]]
            batches = sum(len(batch_ranges(rows, self.batch_size)) for rows in own)
            found = max(found, (sum(own), batches, len(own)))
        return found

    def turns(self, block: BlockShape) -> list[BlockShape]:
        """The block with the groups of each turn: as many as the statistics' memory asks for."""
        limit = self.hessian_memory
        if limit is None and self.device_memory:
            limit = self.device_memory / 2
        if not self.calibrates:
            return [block]
        each = [replace(group, count=1) for group in block.groups for _ in range(group.count)]
        sizes = {
            number: float(summed_bytes(self.settings, group.columns))
            for number, group in enumerate(each)
        }
        found = []
        for numbers in turns(sizes, limit):
            counts: dict[GroupShape, int] = {}
            for number in numbers:
                counts[each[number]] = counts.get(each[number], 0) + 1
            groups = tuple(replace(group, count=count) for group, count in counts.items())
            found.append(replace(block, groups=groups))
        return found

    @property
    def largest_batch(self) -> int:
        """Sequences of the largest batch."""
        return min(self.batch_size, self.nsamples)

    @cached_property
    def busiest_files(self) -> int:
        """Bytes of weight files of the rank that has most."""
        sizes = dict(enumerate(map(float, self.shape.files)))
        owners = deal(list(sizes), sizes, self.workers)
        loads = [0.0] * self.workers
        for index, owner in owners.items():
            loads[owner] += sizes[index]
        return int(max(loads))

    def deal(self, block: BlockShape) -> list[list[tuple[GroupShape, int]]]:
        """Per rank the block's groups in order with the rows it solves, as the workers deal them.

        A group that stands for several (experts) is named once for each.
        """
        return _deal(self.settings, block.groups, self.workers)


@lru_cache(maxsize=256)
def _deal(
    settings: SolverSettings, groups: tuple[GroupShape, ...], workers: int
) -> list[list[tuple[GroupShape, int]]]:
    each = [group for group in groups for _ in range(group.count)]
    parts = []
    for number, group in enumerate(each):
        cost = solve_cost(settings, group.columns)
        layers = {f"{number}.{name}": rows for name, rows, _ in group.layers}
        parts.append(GroupRows(layers, cost.fixed, cost.per_row))
    dealt = row_ranges if solver_for(settings).separable else whole_layers
    found = []
    for ranges in dealt(parts, workers):
        own = []
        for group, part in zip(each, parts, strict=True):
            counts = (ranges.get(name, (0, 0)) for name in part.layers)
            own.append((group, sum(stop - start for start, stop in counts)))
        found.append(own)
    return found
