"""The loss of a block and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pipeline.reconstruct.gradients import gradients, relative_error


def _block() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 10), nn.SiLU(), nn.Linear(10, 6)).double()
    return block, torch.randn(1, 5, 6).double(), torch.randn(1, 5, 6).double()


def test_the_loss_is_the_mean_of_the_counted_tokens_errors() -> None:
    output, target = torch.randn(1, 5, 6), torch.randn(1, 5, 6)
    each = (output - target).square().sum(dim=2) / target.square().sum(dim=2)
    assert torch.isclose(relative_error(output, target), each.mean())
    counted = torch.tensor([[True, False, True, True, False]])
    expected = each[0, [0, 2, 3]].mean()
    assert torch.isclose(relative_error(output, target, counted), expected)
    assert relative_error(output, target, torch.zeros(1, 5, dtype=torch.bool)) == 0


def test_a_huge_token_counts_as_the_others_do() -> None:
    output, target = torch.randn(1, 5, 6), torch.randn(1, 5, 6)
    before = relative_error(output, target)
    output[0, 2] *= 1e4
    target[0, 2] *= 1e4
    assert torch.isclose(relative_error(output, target), before, rtol=1e-4)


def test_targets_of_zeros_give_a_finite_error() -> None:
    zeros = torch.zeros(1, 2, 4)
    assert relative_error(zeros, zeros) == 0
    half = torch.cat([zeros, torch.ones(1, 2, 4)], dim=1)
    assert torch.isfinite(relative_error(half + 0.1, half))


def test_low_precision_outputs_are_compared_in_float32() -> None:
    output = torch.full((1, 1, 2), 300.0, dtype=torch.float16)
    assert relative_error(output, -output) == 4.0


def test_gradients_are_those_of_finite_differences() -> None:
    block, inputs, target = _block()
    weights = [block.get_parameter("0.weight"), block.get_parameter("2.weight")]
    loss, found = gradients(block, weights, inputs, target)
    assert torch.isclose(loss, relative_error(block(inputs), target))
    scale = target.numel() / 5**0.5
    step = 1e-3
    for weight, gradient in zip(weights, found, strict=True):
        for place in ((0, 0), (3, 4)):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    weight[place] += sign * step
                    values.append(float(relative_error(block(inputs), target)))
                    weight[place] -= sign * step
            slope = (values[0] - values[1]) / (2 * step)
            assert float(gradient[place]) / scale == pytest.approx(slope, rel=1e-2, abs=1e-4)


def test_a_weight_that_is_not_reached_has_zeros() -> None:
    block, inputs, target = _block()
    alone = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    _, (_, other) = gradients(block, [block.get_parameter("0.weight"), alone], inputs, target)
    assert torch.equal(other, torch.zeros(3, 2, dtype=torch.float64))


@torch.no_grad()
def test_it_works_where_gradients_are_off() -> None:
    block, inputs, target = _block()
    _, (found,) = gradients(block, [block.get_parameter("0.weight")], inputs, target)
    assert found.any()
