"""Adam for the kept weights of some rows of a layer.

Source: Kingma and Ba, "Adam", 2015, Algorithm 1. Rows are independent of each other, so rows that
are divided over workers have the same bytes as all rows on one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BETA_1, _BETA_2 = 0.9, 0.999
# Gradients have the scale of the model's activations: it is no more than a guard against 0 / 0.
_EPSILON = 1e-30


class RowAdam:
    """The weights of some rows, which it trains, with Adam's two moments.

    weight: (rows, C) fp32, the exact values behind the stored ones. mask: (rows, C) bool; where it
    is False a weight stays 0. rate: the first learning rate, in units of the weights.
    """

    def __init__(self, weight: Tensor, mask: Tensor, rate: float) -> None:
        self.weight, self.mask, self.rate = weight.float().clone(), mask, rate
        self._first = torch.zeros_like(self.weight)
        self._second = torch.zeros_like(self.weight)
        self._steps = 0

    def step(self, gradient: Tensor, factor: float) -> None:
        """One step along a gradient (rows, C) fp32, which is changed. factor: of the rate."""
        self._steps += 1
        gradient.mul_(self.mask)
        self._first.lerp_(gradient, 1 - _BETA_1)
        self._second.mul_(_BETA_2).addcmul_(gradient, gradient, value=1 - _BETA_2)
        first_bias, second_bias = 1 - _BETA_1**self._steps, 1 - _BETA_2**self._steps
        spread = (self._second / second_bias).sqrt_().add_(_EPSILON)
        self.weight.addcdiv_(self._first, spread, value=-self.rate * factor / first_bias)


def first_rate(square_sum: float, kept: int, share: float) -> float:
    """The first learning rate of a layer: `share` of the root mean square of its kept weights.

    square_sum: of the layer's `kept` weights.
    """
    return share * math.sqrt(square_sum / max(kept, 1))
