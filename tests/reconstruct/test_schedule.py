"""Which sequences each step takes, when it ends: on no number of workers does it depend."""

from __future__ import annotations

import math

import pytest

from pipeline.config.reconstruct import default_batch
from pipeline.reconstruct import schedule
from pipeline.reconstruct.schedule import (
    PATIENCE,
    freezes,
    goes_on,
    held_out,
    rate,
    steps_in_epoch,
    steps_of_epoch,
)
from pipeline.runtime.split import even_range


@pytest.mark.parametrize("nsamples", [2, 3, 9, 10, 19, 20, 40, 128, 1000])
def test_a_tenth_is_held_out_and_never_all(nsamples: int) -> None:
    chosen = held_out(nsamples)
    assert len(chosen) == len(set(chosen)) == max(1, nsamples // 10)
    assert all(0 <= number < nsamples for number in chosen)
    assert len(chosen) < nsamples


def test_a_single_sequence_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="1 sequences cannot be divided"):
        held_out(1)


@pytest.mark.parametrize("nsamples", [2, 3, 16, 40, 129])
@pytest.mark.parametrize("batch", [1, 4, 8, 500])
def test_an_epoch_takes_every_other_sequence_once(nsamples: int, batch: int) -> None:
    steps = steps_of_epoch(nsamples, batch, epoch=3, seed=5)
    taken = [number for step in steps for number in step]
    assert sorted([*taken, *held_out(nsamples)]) == list(range(nsamples))
    assert len(steps) == steps_in_epoch(nsamples, batch)
    assert all(len(step) <= batch and step == sorted(step) for step in steps)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {str(steps_of_epoch(40, 4, epoch, seed)) for epoch in range(4) for seed in range(4)}
    assert len(orders) == 16
    assert steps_of_epoch(40, 4, 1, 2) == steps_of_epoch(40, 4, 1, 2)


@pytest.mark.parametrize(
    ("nsamples", "batch"),
    [(1, 1), (8, 1), (31, 1), (32, 2), (40, 2), (128, 8), (256, 16), (9999, 16)],
)
def test_an_epoch_has_about_sixteen_steps(nsamples: int, batch: int) -> None:
    assert default_batch(nsamples) == batch


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_have_equal_shares_of_a_step(world: int) -> None:
    shares = [range(*even_range(128, rank, world)) for rank in range(world)]
    for step in steps_of_epoch(128, 8, 0, 0)[:-1]:
        counts = [sum(number in share for number in step) for share in shares]
        assert max(counts) - min(counts) <= 2, step


def test_the_rate_falls_in_a_line_and_ends_above_zero() -> None:
    rates = [rate(step, 4) for step in range(4)]
    assert rates == [1.0, 0.75, 0.5, 0.25]


def test_the_mask_is_fixed_for_the_last_steps() -> None:
    assert [freezes(step, 10) for step in range(10)] == [False] * 6 + [True] * 4


def test_large_blocks_are_trained_in_parts() -> None:
    most = schedule.MOST_WEIGHTS
    assert schedule.parts({}) == []
    assert schedule.parts({"q": most // 2, "k": most // 2}) == [["q", "k"]]
    assert schedule.parts({"q": most // 2, "k": most, "v": 1}) == [["q"], ["k"], ["v"]]
    assert schedule.parts({"q": 3 * most, "k": 1}) == [["q"], ["k"]]


class TestGoesOn:
    def test_while_the_loss_falls(self) -> None:
        assert goes_on([3.0], 4)
        assert goes_on([3.0, 2.0, 1.0], 4)

    def test_not_after_epochs_without_a_lower_one(self) -> None:
        losses = [3.0, 2.0, *([2.5] * (PATIENCE - 1))]
        assert goes_on(losses, 1)
        assert not goes_on([*losses, 2.5], 1)

    def test_not_before_the_mask_is_fixed_and_the_rate_is_low(self) -> None:
        losses = [3.0, *([3.5] * 8)]
        assert goes_on(losses, 10)  # 8 of 10 epochs done; counted from 6 on
        assert not goes_on([*losses, 3.5], 10)

    def test_not_after_one_that_is_not_finite(self) -> None:
        assert not goes_on([3.0, math.nan], 9)
        assert not goes_on([3.0, math.inf], 9)
