"""Divides sequences, rows and files over the workers: pure functions, the same on every worker."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")

# Sequences of an activation shard, unless a batch is larger: files are not tiny, and workers still
# get equal shares.
_SEQUENCES_PER_SHARD = 4
# Rows that a solve is padded to a multiple of (pipeline.solvers.base); other cuts only cost more.
ROW_TILE = 16
_BISECTIONS = 60


def sequences_per_shard(batch_size: int) -> int:
    """Sequences in an activation shard: whole batches, independent of the number of workers."""
    return batch_size * max(1, _SEQUENCES_PER_SHARD // batch_size)


def shard_ranges(nsamples: int, batch_size: int) -> list[tuple[int, int]]:
    """The half-open range of sequences of each activation shard, in order."""
    step = sequences_per_shard(batch_size)
    return [(start, min(start + step, nsamples)) for start in range(0, nsamples, step)]


def batch_ranges(rows: int, batch_size: int) -> list[tuple[int, int]]:
    """The half-open range of sequences of each batch, within an activation shard of `rows`."""
    return [(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]


def even_range(count: int, rank: int, world: int) -> tuple[int, int]:
    """The half-open range of `count` items for `rank`, of `world`; sizes differ by at most one."""
    return rank * count // world, (rank + 1) * count // world


def second_half(counts: Sequence[int]) -> int | None:
    """The first sequence of the second half, where two halves of the calibration are compared.

    counts: of each sequence, the tokens that statistics are taken of. Their numbers in the two
    halves differ as little as they can, and neither is 0; with equal counts it is half of the
    sequences, rounded down. None where one sequence has all of the tokens, or there are none.
    """
    total, before = sum(counts), 0
    best: tuple[int, int] | None = None
    for index, count in enumerate(counts):
        if 0 < before < total:
            distance = abs(total - 2 * before)
            if best is None or distance < best[0]:
                best = distance, index
        before += count
    return None if best is None else best[1]


@dataclass(frozen=True)
class GroupRows:
    """A group of layers that are solved together.

    layers: name -> rows, in order. fixed: cost for each worker that has any of the rows. per_row:
    cost of each row, in the same unit. together: what `fixed` costs each worker besides an equal
    share of it where those that have rows compute it together; infinite where they cannot.
    """

    layers: Mapping[str, int]
    fixed: float
    per_row: float
    together: float = math.inf

    def is_joint(self, ranks: int) -> bool:
        """Whether this many ranks compute the fixed part together: where that costs each less."""
        return self.fixed / ranks + self.together < self.fixed

    def fixed_among(self, ranks: int) -> float:
        """The fixed cost of each of the ranks that have rows of the group."""
        return self.fixed / ranks + self.together if self.is_joint(ranks) else self.fixed


def row_ranges(groups: Sequence[GroupRows], world: int) -> list[dict[str, tuple[int, int]]]:
    """For each rank, the rows start:stop of each layer that it solves, so that costs are equal.

    The rows of all groups are concatenated, the groups with the highest fixed cost first, and cut
    into one piece per rank (McNaughton's wrap-around rule). So a group is divided, and its fixed
    cost paid again, only where a cut falls into it. Bisection finds the lowest cost at which the
    pieces contain all rows. Cuts are at whole tiles of rows, to which solves are padded. A layer
    without rows on a rank is left out there.

    Where ranks compute the fixed part of a group together, its cost depends on their number. Some
    numbers are tried, first all ranks, then as many as that division has, and the best is taken.
    """
    divisions = [_balanced(groups, world)]
    sharers, tried = world, {1}
    while sharers not in tried and any(group.is_joint(sharers) for group in groups):
        tried.add(sharers)
        shared = [replace(group, fixed=group.fixed_among(sharers)) for group in groups]
        divisions.append(_balanced(shared, world))
        sharers = max(
            len(ranks_of(group.layers, divisions[-1])) for group in groups if group.is_joint(world)
        )
    return min(divisions, key=lambda pieces: _slowest(groups, pieces))


def ranks_of(
    layers: Iterable[str], pieces: Sequence[Mapping[str, tuple[int, int]]]
) -> tuple[int, ...]:
    """The ranks that have rows of any of the layers. pieces: see `row_ranges`."""
    names = set(layers)
    return tuple(rank for rank, ranges in enumerate(pieces) if not names.isdisjoint(ranges))


def _slowest(groups: Sequence[GroupRows], pieces: list[dict[str, tuple[int, int]]]) -> float:
    """The cost of the rank that takes longest."""
    loads = [0.0] * len(pieces)
    for group in groups:
        ranks = ranks_of(group.layers, pieces)
        for rank in ranks:
            ranges = [pieces[rank][layer] for layer in group.layers if layer in pieces[rank]]
            loads[rank] += group.fixed_among(len(ranks))
            loads[rank] += group.per_row * sum(stop - start for start, stop in ranges)
    return max(loads)


def _balanced(groups: Sequence[GroupRows], world: int) -> list[dict[str, tuple[int, int]]]:
    """`row_ranges` with fixed costs as they are."""
    order = sorted(groups, key=lambda group: -group.fixed)
    low = sum(group.per_row * sum(group.layers.values()) for group in order) / world
    high = sum(_cost(group, sum(group.layers.values())) for group in order)
    low, high = min(low, high), max(low, high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _cut(order, world, middle) is None:
            low = middle
        else:
            high = middle
    pieces = _cut(order, world, high)
    # At `high` all rows fit one rank, except for the rounding of a sum.
    return pieces if pieces is not None else [_whole(order), *({} for _ in range(world - 1))]


def _cut(
    order: Sequence[GroupRows], world: int, limit: float
) -> list[dict[str, tuple[int, int]]] | None:
    """Fills rank after rank up to the cost `limit`; None where rows are left over."""
    pieces: list[dict[str, tuple[int, int]]] = [{} for _ in range(world)]
    rank, left = 0, limit
    for group in order:
        for name, rows in group.layers.items():
            start = 0
            while start < rows:
                paid = any(layer in pieces[rank] for layer in group.layers)
                budget = left - (0.0 if paid else group.fixed)
                tiles = budget / (group.per_row * ROW_TILE) if group.per_row else math.inf
                fits = rows - start
                if tiles < fits / ROW_TILE:
                    fits = max(int(tiles), 0) * ROW_TILE
                if fits:
                    # The last, partial tile of a layer may still fit after its whole tiles.
                    begin, _ = pieces[rank].get(name, (start, start))
                    pieces[rank][name] = (begin, start + fits)
                    left = budget - fits * group.per_row
                    start += fits
                elif rank + 1 == world:
                    return None
                else:
                    rank, left = rank + 1, limit
    return pieces


def _cost(group: GroupRows, rows: int) -> float:
    return group.fixed + group.per_row * rows


def _whole(order: Sequence[GroupRows]) -> dict[str, tuple[int, int]]:
    return {name: (0, rows) for group in order for name, rows in group.layers.items() if rows}


def in_passes(sizes: Mapping[T, float], limit: float | None) -> list[list[T]]:
    """The groups of each pass, such that the statistics of a pass take at most `limit` bytes.

    sizes: group -> bytes of its statistics. limit: None for a single pass. The groups stay in
    order, so that the forward of a pass can end early. A group larger than the limit has a pass of
    its own.
    """
    passes: list[list[T]] = []
    left = 0.0
    for item, size in sizes.items():
        if not passes or (limit is not None and size > left):
            passes.append([])
            left = math.inf if limit is None else limit
        passes[-1].append(item)
        left -= size
    return passes


def whole_layers(groups: Sequence[GroupRows], world: int) -> list[dict[str, tuple[int, int]]]:
    """`row_ranges` for a solver that compares the rows of a layer: each layer goes to one rank."""
    cost = {
        name: _cost(group, rows) for group in groups for name, rows in group.layers.items() if rows
    }
    owners = deal(list(cost), cost, world)
    rows = {name: count for group in groups for name, count in group.layers.items()}
    return [
        {name: (0, rows[name]) for name, owner in owners.items() if owner == rank}
        for rank in range(world)
    ]


def deal(items: Sequence[T], cost: Mapping[T, float], world: int) -> dict[T, int]:
    """Item -> rank: the costliest items first, each to the rank with the lowest cost so far."""
    loads = [0.0] * world
    owners: dict[T, int] = {}
    for item in sorted(items, key=lambda item: -cost[item]):
        rank = loads.index(min(loads))
        owners[item] = rank
        loads[rank] += cost[item]
    return owners
