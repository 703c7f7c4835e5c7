"""Who does what: pure decisions about sequences, rows and files, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

# Sequences of an activation shard where the batch is smaller: files neither tiny nor so large that
# few workers could share the sequences evenly.
_SEQUENCES_PER_SHARD = 4


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


def row_ranges(
    layers: Mapping[str, tuple[int, int]], rank: int, world: int, *, separable: bool
) -> dict[str, tuple[int, int]]:
    """The rows of each layer (R, C) that `rank` solves; layers without rows are left out.

    Where a solver compares rows with each other (`separable` False), whole layers are dealt to the
    ranks, the costliest first, each to the rank with the least work so far.
    """
    if separable:
        ranges = {name: even_range(rows, rank, world) for name, (rows, _) in layers.items()}
        return {name: (start, stop) for name, (start, stop) in ranges.items() if stop > start}
    cost = {name: float(rows) * columns * columns for name, (rows, columns) in layers.items()}
    owners = deal(list(layers), cost, world)
    return {name: (0, layers[name][0]) for name in layers if owners[name] == rank}


def deal(items: Sequence[T], cost: Mapping[T, float], world: int) -> dict[T, int]:
    """Item -> rank: the costliest first, each to the rank with the least cost so far."""
    loads = [0.0] * world
    owners: dict[T, int] = {}
    for item in sorted(items, key=lambda item: -cost[item]):
        rank = loads.index(min(loads))
        owners[item] = rank
        loads[rank] += cost[item]
    return owners
