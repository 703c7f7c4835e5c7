"""Adam on rows of kept weights, against torch's."""

from __future__ import annotations

import math

import torch

from pipeline.config.pattern import Pattern
from pipeline.reconstruct.adam import ExchangingAdam, RowAdam, first_rate
from pipeline.solvers.masks import holds, keep_mask

PATTERN = Pattern.parse("2:4")


def _layer() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 8, generator=generator)
    return weight, torch.rand(12, 8, generator=generator) > 0.5


def _gradients(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(12, 8, generator=generator) for _ in range(count)]


def test_it_is_torchs_adam_on_the_kept_weights() -> None:
    weight, mask = _layer()
    state = RowAdam(weight * mask, 1e-2)
    reference = torch.nn.Parameter((weight * mask).double())
    optimizer = torch.optim.Adam([reference], lr=1e-2, eps=1e-30)
    for number, gradient in enumerate(_gradients(7)):
        factor = 1 - number / 7
        state.step(gradient.clone(), factor)
        optimizer.param_groups[0]["lr"] = 1e-2 * factor
        reference.grad = gradient.double() * mask
        optimizer.step()
    torch.testing.assert_close(state.weight(), reference.detach().float())
    assert not state.weight()[~mask].any()


def test_rows_apart_have_the_bytes_of_all_rows() -> None:
    weight, mask = _layer()
    whole = RowAdam(weight * mask, 1e-2)
    parts = [RowAdam((weight * mask)[rows], 1e-2) for rows in _thirds()]
    for gradient in _gradients(5):
        whole.step(gradient.clone(), 0.5)
        for rows, part in zip(_thirds(), parts, strict=True):
            part.step(gradient[rows].clone(), 0.5)
    assert torch.equal(whole.weight(), torch.cat([part.weight() for part in parts]))


def test_a_weight_without_a_gradient_does_not_move() -> None:
    weight, mask = _layer()
    state = RowAdam(weight * mask, 1e-2)
    state.step(torch.zeros(12, 8), 1.0)
    assert torch.equal(state.weight(), weight * mask)


def test_it_changes_nothing_that_it_was_given() -> None:
    weight, _ = _layer()
    before = weight.clone()
    RowAdam(weight, 1e-2).step(torch.ones(12, 8), 1.0)
    assert torch.equal(weight, before)


class TestExchange:
    """Pruned weights that grow take the place of kept ones, until the mask is fixed."""

    def _state(self) -> tuple[ExchangingAdam, torch.Tensor, torch.Tensor]:
        weight, _ = _layer()
        scale = torch.linspace(0.5, 2.0, 8)
        mask = keep_mask(PATTERN, (weight * scale).abs())
        return ExchangingAdam(weight * mask, 1e-2, weight, scale, PATTERN), weight, mask

    def test_it_begins_with_the_solved_weights(self) -> None:
        state, weight, mask = self._state()
        assert torch.equal(state.weight(), weight * mask)

    def test_a_weight_whose_gradient_pulls_comes_in(self) -> None:
        state, weight, mask = self._state()
        row, column = 3, int((~mask[3]).nonzero()[0])
        gradient = torch.zeros(12, 8)
        gradient[row, column] = -torch.sign(weight[row, column])
        for _ in range(2000):
            state.step(gradient.clone(), 1.0)
        now = state.weight()
        assert now[row, column] != 0
        assert holds(PATTERN, now)
        others = [number for number in range(12) if number != row]
        assert torch.equal(now[others], (weight * mask)[others])

    def test_a_pruned_weight_must_be_larger_by_a_third_or_so(self) -> None:
        """It moves a quarter as fast as a kept one, and waits for an even step."""
        weight = torch.tensor([[4.0, 3.0, 2.7, 0.1]])
        mask = torch.tensor([[True, True, False, False]])
        state = ExchangingAdam(weight * mask, 0.1, weight, torch.ones(4), PATTERN)
        entered = 0
        for number in range(1, 100):
            state.step(torch.tensor([[0.0, 0.0, -1.0, 0.0]]), 1.0)
            if not entered and state.weight()[0, 2] != 0:
                entered = number
        # From 2.7 to 1.3 * 3 at 0.1 / 4 a step.
        assert entered == 48
        assert torch.allclose(state.weight()[0, 2], torch.tensor(2.7 + 48 * 0.025 + 51 * 0.1))

    def test_once_fixed_the_pruned_ones_are_gone(self) -> None:
        state, _, _ = self._state()
        for gradient in _gradients(5):
            state.step(gradient, 1.0)
        state.freeze()
        fixed = state.weight().clone()
        state.step(torch.zeros(12, 8), 1.0)
        assert torch.equal(state.weight() != 0, fixed != 0)
        assert holds(PATTERN, state.weight())

    def test_pruned_weights_of_inputs_that_are_always_zero_stay_pruned(self) -> None:
        """Also where their whole group is pruned, as a solve leaves it."""
        weight, _ = _layer()
        scale = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0])
        mask = keep_mask(PATTERN, (weight * scale).abs()) & (scale > 0)
        state = ExchangingAdam(weight * mask, 1e-2, weight, scale, PATTERN)
        for gradient in _gradients(20):
            state.step(gradient * (scale > 0), 1.0)
        state.freeze()
        assert torch.equal((state.weight() != 0).any(dim=0), scale > 0)

    def test_weights_without_any_input_stay(self) -> None:
        """As those of an expert that no token reaches."""
        weight, _ = _layer()
        mask = keep_mask(PATTERN, weight.abs())
        state = ExchangingAdam(weight * mask, 1e-2, weight, torch.zeros(8), PATTERN)
        for _ in range(10):
            state.step(torch.zeros(12, 8), 1.0)
        assert torch.equal(state.weight(), weight * mask)

    def test_once_fixed_it_stays(self) -> None:
        state, _, mask = self._state()
        state.freeze()
        for gradient in _gradients(50):
            state.step(gradient, 1.0)
        assert torch.equal(state.weight() != 0, mask)

    def test_a_row_is_the_group_of_an_unstructured_pattern(self) -> None:
        pattern = Pattern.parse("unstructured:0.5")
        weight, _ = _layer()
        mask = keep_mask(pattern, weight.abs())
        state = ExchangingAdam(weight * mask, 1e-2, weight, torch.ones(8), pattern)
        for gradient in _gradients(50):
            state.step(gradient, 1.0)
        assert ((state.weight() != 0).sum(dim=1) == 4).all()

    def test_inputs_that_are_always_zero_do_no_harm(self) -> None:
        weight, _ = _layer()
        scale = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0])
        mask = keep_mask(PATTERN, (weight * scale).abs())
        state = ExchangingAdam(weight * mask, 1e-2, weight, scale, PATTERN)
        for gradient in _gradients(20):
            state.step(gradient, 1.0)
        assert state.weight().isfinite().all()
        assert holds(PATTERN, state.weight())


def test_the_rate_is_relative_to_the_kept_weights() -> None:
    assert math.isclose(first_rate(4 * 9.0, 4, 0.1), 0.3)
    assert first_rate(0.0, 0, 0.1) == 0.0


def _thirds() -> list[slice]:
    return [slice(0, 4), slice(4, 8), slice(8, 12)]
