"""What is planned: a model's shape, a job's settings, and the machines they would run on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from pipeline.config.solver import AUTO, SolverSettings
from pipeline.models.forward_capture import LayerGroup
from pipeline.planning.counts import statistic_bytes, summed_bytes
from pipeline.planning.rates import Rates
from pipeline.planning.shapes.experts import most_held
from pipeline.planning.shapes.model import BlockShape, GroupShape, ModelShape
from pipeline.runtime.split import batch_ranges, deal, even_range, in_passes, shard_ranges
from pipeline.solvers.registry import solver_for
from pipeline.worker.few_tokens import simpler_settings
from pipeline.worker.solve import deal_rows


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """One job on one cluster. `settings` are resolved; `rates` are those of one worker.

    hessian_memory: bytes of statistics that a worker may hold at once, None for half of a GPU's
    memory and for any number on a CPU. host_memory, disk: bytes of a node's memory and of free
    disk, None where unknown. device_memory: bytes of each worker's GPU, 0 on CPUs. in_process: the
    local executor, one process that runs rank after rank. expert_tokens: as for `prune`. uneven:
    whether experts hold what they can at most, instead of what even shares of the tokens take.
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
    uneven: bool = False

    @property
    def per_node(self) -> int:
        """Workers on the fullest node."""
        return -(-self.workers // self.nodes)

    @cached_property
    def every(self) -> tuple[SolverSettings, ...]:
        """The settings that some layer may have."""
        groups = (group for kind in self.shape.kinds for group in kind.groups)
        return (self.settings, *{g.override: None for g in groups if g.override is not None})

    @cached_property
    def calibrates(self) -> bool:
        """Whether there are activations at all."""
        return any(solver_for(settings).needs != "none" for settings in self.every)

    @cached_property
    def halves(self) -> int:
        """2 where statistics of both halves of the calibration are held, to choose by; else 1."""
        return 2 if any(settings.shrinkage == AUTO for settings in self.every) else 1

    @cached_property
    def routes(self) -> bool:
        """Whether which expert a token is sent to decides what is held."""
        return any(group.active for kind in self.shape.kinds for group in kind.groups)

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

    def settings_of(self, group: GroupShape) -> SolverSettings:
        """How a group is asked to be solved."""
        return group.override or self.settings

    def solved_with(self, group: GroupShape) -> SolverSettings:
        """How a group is solved: an expert of too few tokens otherwise than asked."""
        asked = self.settings_of(group)
        least = max(self.expert_tokens, 1) if group.kept and not self.uneven else 0
        return simpler_settings(asked, self.tokens(group), least) or asked

    def tokens(self, group: GroupShape) -> float:
        """Calibration tokens that a group sees in all; where routing is uneven, at most."""
        share = 1.0 if self.uneven else group.share
        return share * self.nsamples * self.seqlen

    def own_tokens(self, group: GroupShape) -> float:
        """The busiest rank's part of `tokens`."""
        return self.tokens(group) * self.busiest[0] / self.nsamples

    def inputs(self, group: GroupShape) -> float | None:
        """How many inputs stand for a group's Hessian; None where the matrix does."""
        tokens = self.tokens(group)
        return tokens if group.kept and tokens < group.columns else None

    def statistics(self, groups: Iterable[GroupShape]) -> float:
        """Bytes of groups' statistics on one rank."""
        return self._held(groups, self.nsamples * self.seqlen, statistic_bytes, 4)

    def sums(self, groups: Iterable[GroupShape]) -> float:
        """Bytes of groups' running sums on one rank, of which the statistics are made."""
        tokens = self.busiest[0] * self.seqlen / self.halves
        return self._held(groups, tokens, summed_bytes, self.shape.forward_itemsize)

    def _held(
        self,
        groups: Iterable[GroupShape],
        tokens: float,
        whole: Callable[[SolverSettings, int, int], int],
        itemsize: int,
    ) -> float:
        """tokens: that come, before routing; whole: bytes where no inputs are kept."""
        total = 0.0
        for group, count in Counter(groups).items():
            settings, columns = self.settings_of(group), group.columns
            matrix = float(whole(settings, columns, self.halves))
            each = float(columns * itemsize)
            if not group.kept or solver_for(settings).needs != "full":
                total += count * matrix
            elif self.uneven and group.active:
                # Of two halves each is routed for itself.
                one = most_held(count, group.active, tokens, columns, matrix / self.halves, each)
                total += self.halves * one
            else:
                own = group.share * tokens
                total += count * (matrix if own >= columns else self.halves * own * each)
        return total

    def counted(self, groups: Iterable[GroupShape]) -> float:
        """Bytes of groups' running sums as `--hessian-memory` counts them: matrices, whatever
        inputs are kept."""
        return float(sum(summed_bytes(self.settings_of(g), g.columns, self.halves) for g in groups))

    def passes(self, block: BlockShape) -> list[BlockShape]:
        """The block with the groups of each pass: as many as the statistics' memory asks for."""
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
    def busiest_files(self) -> int:
        """Bytes of weight files of the rank that has most."""
        sizes = dict(enumerate(map(float, self.shape.files)))
        owners = deal(list(sizes), sizes, self.workers)
        loads = [0.0] * self.workers
        for index, owner in owners.items():
            loads[owner] += sizes[index]
        return int(max(loads))

    def deal(self, block: BlockShape) -> list[list[tuple[GroupShape, int]]]:
        """Per rank the block's groups and the rows it solves of each, as the workers deal them."""
        return _deal(tuple(map(self.settings_of, block.groups)), block.groups, self.workers)


@lru_cache(maxsize=256)
def _deal(
    settings: tuple[SolverSettings, ...], groups: tuple[GroupShape, ...], workers: int
) -> list[list[tuple[GroupShape, int]]]:
    shapes: dict[str, tuple[int, int]] = {}
    chosen: dict[str, SolverSettings] = {}
    parts = []
    for number, group in enumerate(groups):
        own = {f"{number}.{name}": (rows, columns) for name, rows, columns in group.layers}
        shapes |= own
        chosen |= dict.fromkeys(own, settings[number])
        parts.append(LayerGroup(tuple(own), group.columns))
    found = []
    for ranges in deal_rows(chosen, parts, shapes, workers):
        rows = [
            sum(stop - start for start, stop in (ranges.get(n, (0, 0)) for n in part.layers))
            for part in parts
        ]
        found.append(list(zip(groups, rows, strict=True)))
    return found
