"""Who does what: pure decisions about sequences, rows and files, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# Sequences of an activation shard where the batch is smaller: files neither tiny nor so large that
# few workers could share the sequences evenly.
_SEQUENCES_PER_SHARD = 4
# Rows that a solve is padded to (pipeline.solvers.base): a cut elsewhere would only cost more.
ROW_TILE = 16
_BISECTIONS = 60


def sequences_per_shard(batch_size: int) -> int:
    """Sequences in an activation shard: whole batches, whatever the number of workers."""
    return batch_size * max(1, _SEQUENCES_PER_SHARD // batch_size)


def shard_ranges(nsamples: int, batch_size: int) -> list[tuple[int, int]]:
    """The half-open range of sequences of each activation shard, in order."""
    step = sequences_per_shard(batch_size)
    return [(start, min(start + step, nsamples)) for start in range(0, nsamples, step)]


def batch_ranges(rows: int, batch_size: int) -> list[tuple[int, int]]:
    """The half-open range of rows of each batch of an activation shard; none crosses shards."""
    return [(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]


def even_range(count: int, rank: int, world: int) -> tuple[int, int]:
    """Rank's contiguous share of `count` items; shares differ by at most one."""
    return rank * count // world, (rank + 1) * count // world


@dataclass(frozen=True)
class GroupRows:
    """A group of layers that are solved together: rows of each, in order, and what they cost.

    fixed: paid by each rank that has any of the rows; per_row: for each row; in one unit.
    """

    layers: Mapping[str, int]
    fixed: float
    per_row: float


def row_ranges(groups: Sequence[GroupRows], world: int) -> list[dict[str, tuple[int, int]]]:
    """The rows start:stop of each layer that each rank solves, so that all take equally long.

    The groups' rows are laid end to end, those with the highest fixed cost first, and cut into one
    piece per rank (McNaughton's wrap-around rule): a group is shared, and its fixed cost paid
    again, only where a cut falls into it. The least time in which the pieces hold all rows is
    found by bisection. Cuts are at whole tiles of rows, which is what a solve is padded to. A
    layer without rows on a rank is left out there.
    """
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
    # At `high` all rows fit one rank, but for the rounding of a sum.
    return pieces if pieces is not None else [_whole(order), *({} for _ in range(world - 1))]


def _cut(
    order: Sequence[GroupRows], world: int, limit: float
) -> list[dict[str, tuple[int, int]]] | None:
    """Fills rank after rank up to `limit`; None where rows are left over."""
    pieces: list[dict[str, tuple[int, int]]] = [{} for _ in range(world)]
    rank, room = 0, limit
    for group in order:
        for name, rows in group.layers.items():
            start = 0
            while start < rows:
                paid = any(layer in pieces[rank] for layer in group.layers)
                budget = room - (0.0 if paid else group.fixed)
                tiles = budget / (group.per_row * ROW_TILE) if group.per_row else math.inf
                fits = rows - start
                if tiles < fits / ROW_TILE:
                    fits = max(int(tiles), 0) * ROW_TILE
                if fits:
                    # The last, partial tile of a layer may still fit behind its whole ones.
                    begin, _ = pieces[rank].get(name, (start, start))
                    pieces[rank][name] = (begin, start + fits)
                    room = budget - fits * group.per_row
                    start += fits
                elif rank + 1 == world:
                    return None
                else:
                    rank, room = rank + 1, limit
    return pieces


def _cost(group: GroupRows, rows: int) -> float:
    return group.fixed + group.per_row * rows


def _whole(order: Sequence[GroupRows]) -> dict[str, tuple[int, int]]:
    return {name: (0, rows) for group in order for name, rows in group.layers.items() if rows}


def in_passes(sizes: Mapping[T, float], limit: float | None) -> list[list[T]]:
    """Groups, by the bytes of their statistics, in as many passes as `limit` bytes at once ask for.

    In order, so that the forward of a pass can end early; what is larger than the limit by itself
    has a pass of its own. None: all at once.
    """
    found: list[list[T]] = []
    room = 0.0
    for item, size in sizes.items():
        if not found or (limit is not None and size > room):
            found.append([])
            room = math.inf if limit is None else limit
        found[-1].append(item)
        room -= size
    return found


def whole_layers(groups: Sequence[GroupRows], world: int) -> list[dict[str, tuple[int, int]]]:
    """`row_ranges` where a solver compares the rows of a layer: each layer goes to one rank."""
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
    """Item -> rank: the costliest first, each to the rank with the least cost so far."""
    loads = [0.0] * world
    owners: dict[T, int] = {}
    for item in sorted(items, key=lambda item: -cost[item]):
        rank = loads.index(min(loads))
        owners[item] = rank
        loads[rank] += cost[item]
    return owners
