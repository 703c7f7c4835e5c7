"""How sequences, rows and files are dealt: everything exactly once, the same on every rank."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.split import (
    batch_ranges,
    deal,
    even_range,
    row_ranges,
    sequences_per_shard,
    shard_ranges,
)

COUNTS = st.integers(1, 500)
WORLDS = st.integers(1, 20)
SHAPES = st.dictionaries(
    st.sampled_from(["q", "k", "v", "o", "up", "down"]),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    min_size=1,
)


def covers(ranges: list[tuple[int, int]], count: int) -> bool:
    """Whether half-open ranges, in this order, hold each of 0..count-1 once."""
    return list(itertools.chain(*(range(*r) for r in ranges))) == list(range(count))


@given(nsamples=COUNTS, batch_size=st.integers(1, 40))
def test_shards_hold_every_sequence_once_in_whole_batches(nsamples: int, batch_size: int) -> None:
    shards = shard_ranges(nsamples, batch_size)
    assert covers(shards, nsamples)
    size = sequences_per_shard(batch_size)
    assert size % batch_size == 0
    assert {stop - start for start, stop in shards[:-1]} <= {size}
    assert all(start % batch_size == 0 for start, _ in shards)


@given(rows=COUNTS, batch_size=st.integers(1, 40))
def test_batches_cover_a_shard(rows: int, batch_size: int) -> None:
    batches = batch_ranges(rows, batch_size)
    assert covers(batches, rows)
    assert all(0 < stop - start <= batch_size for start, stop in batches)


@given(count=st.integers(0, 500), world=WORLDS)
def test_even_shares_differ_by_one_at_most(count: int, world: int) -> None:
    shares = [even_range(count, rank, world) for rank in range(world)]
    assert covers(shares, count)
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1


@given(layers=SHAPES, world=WORLDS)
def test_separable_layers_are_cut_by_rows(layers: dict[str, tuple[int, int]], world: int) -> None:
    per_rank = [row_ranges(layers, rank, world, separable=True) for rank in range(world)]
    for name, (rows, _) in layers.items():
        assert covers([ranges[name] for ranges in per_rank if name in ranges], rows)
    assert all(stop > start for ranges in per_rank for start, stop in ranges.values())


@given(layers=SHAPES, world=WORLDS)
def test_other_layers_go_whole_to_one_rank(layers: dict[str, tuple[int, int]], world: int) -> None:
    per_rank = [row_ranges(layers, rank, world, separable=False) for rank in range(world)]
    for name, (rows, _) in layers.items():
        assert [r[name] for r in per_rank if name in r] == [(0, rows)]


@given(costs=st.dictionaries(st.integers(), st.integers(1, 1000), min_size=1), world=WORLDS)
def test_no_rank_is_loaded_beyond_the_mean_and_one_item(costs: dict[int, int], world: int) -> None:
    owners = deal(list(costs), {key: float(cost) for key, cost in costs.items()}, world)
    assert owners.keys() == costs.keys()
    loads = [sum(costs[k] for k, owner in owners.items() if owner == r) for r in range(world)]
    assert max(loads) <= sum(costs.values()) / world + max(costs.values())


def test_the_costliest_is_dealt_first() -> None:
    assert deal(["a", "b", "c"], {"a": 1.0, "b": 5.0, "c": 4.0}, 2) == {"b": 0, "c": 1, "a": 1}


@pytest.mark.parametrize(("batch_size", "sequences"), [(1, 4), (2, 4), (3, 3), (4, 4), (6, 6)])
def test_sequences_of_a_shard(batch_size: int, sequences: int) -> None:
    assert sequences_per_shard(batch_size) == sequences
