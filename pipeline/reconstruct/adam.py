"""Adam for the kept weights of some rows of a layer.

Source: Kingma and Ba, "Adam", 2015, Algorithm 1. Rows are independent of each other, so rows that
are divided over workers have the same bytes as all rows on one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.config.pattern import Pattern
from pipeline.solvers.masks import keep_mask

_BETA_1, _BETA_2 = 0.9, 0.999
# Where the second moment begins, so that a weight without gradients is not moved by 0 / 0. Those of
# others are larger by far: gradients have the scale of the model's activations.
_FIRST_SECOND = 1e-30
# A larger factor has no fp32: whatever it is multiplied with, a loss will not be finite.
_LARGEST = torch.finfo(torch.float32).max
# Of the smallest kept weight of its group: how large a pruned one is at the start of an exchange.
_HIDDEN_SHARE = 0.9
# Of the rate: how fast a pruned weight moves in an exchange.
_HIDDEN_RATE = 0.25
# How much larger than a kept weight a pruned one must be to take its place.
_ADVANTAGE = 1.3
# Steps after which the mask of an exchange is made anew.
_MASK_STEPS = 2
# Of the mean scale of a layer's inputs: the least one that a weight is compared by.
_LEAST_SCALE = 1e-3


class RowAdam:
    """The weights of some rows, which it trains, with Adam's two moments.

    weight: (rows, C) of any float dtype. rate: the first learning rate, in units of the weights.
    whole: whether all weights are trained; else those that are not 0, and the others stay 0.
    """

    def __init__(self, weight: Tensor, rate: float, *, whole: bool = False) -> None:
        self._weight, self._rate = weight.float().clone(), rate
        self._mask = torch.ones_like(self._weight, dtype=torch.bool) if whole else weight != 0
        self._first = torch.zeros_like(self._weight)
        self._second = torch.full_like(self._weight, _FIRST_SECOND)
        self._steps = 0

    def step(self, gradient: Tensor, factor: float) -> None:
        """One step along a gradient (rows, C) fp32, which is changed. factor: of the rate."""
        self._steps += 1
        self._restrict(gradient)
        self._first.lerp_(gradient, 1 - _BETA_1)
        self._second.mul_(_BETA_2).addcmul_(gradient, gradient, value=1 - _BETA_2)
        first_bias, second_bias = 1 - _BETA_1**self._steps, 1 - _BETA_2**self._steps
        size = min(self._rate * factor * math.sqrt(second_bias) / first_bias, _LARGEST)
        self._weight.addcdiv_(self._first, self._slowed(self._second.sqrt()), value=-size)

    def weight(self) -> Tensor:
        """The weights now, (rows, C) fp32, 0 where they are pruned."""
        return self._weight

    def freeze(self) -> None:
        """Fixes the mask from now on; without an exchange it always is."""

    def _restrict(self, gradient: Tensor) -> None:
        gradient.mul_(self._mask)

    def _slowed(self, spread: Tensor) -> Tensor:
        """What a step is divided by, of each weight; may be changed."""
        return spread


class ExchangingAdam(RowAdam):
    """The same, where pruned weights are trained too, unseen, and may take the place of kept ones.

    A forward sees the largest weights of each group; the gradient with respect to them is applied
    to all (straight-through). "Large" is meant in the scale of the inputs. Pruned weights move
    slower, and must be larger than a kept one by `_ADVANTAGE` to take its place: else weights
    change places to and fro, and the error rises.

    dense: (rows, C), the weights before pruning, from which the pruned ones start, not larger than
    `_HIDDEN_SHARE` of their group's smallest kept one. scale: (C,) fp32, the root mean square of
    each input. pattern: of an unstructured one a row is the group.
    """

    def __init__(
        self, weight: Tensor, rate: float, dense: Tensor, scale: Tensor, pattern: Pattern
    ) -> None:
        super().__init__(weight, rate)
        # Weights whose input was always 0 stay as they were solved: the larger ones are kept, and
        # a pruned one is 0 and gets no gradient.
        live, least = scale > 0, _LEAST_SCALE * scale.mean()
        scale = scale.clamp(min=least) if least > 0 else torch.ones_like(scale)
        self._scale, self._pattern, self._frozen = scale, pattern, False
        shape = (len(weight), -1, pattern.group or weight.shape[1])
        kept = (self._weight * scale).abs().masked_fill(~self._mask, math.inf).view(shape)
        most = _HIDDEN_SHARE * kept.amin(dim=2, keepdim=True)
        hidden = (dense.float() * scale).view(shape)
        hidden = hidden.clamp(-most, most).view_as(self._weight) / scale
        hidden = torch.where(live, hidden, 0.0)
        self._weight = torch.where(self._mask, self._weight, hidden)

    def step(self, gradient: Tensor, factor: float) -> None:
        """One step along a gradient, as of a fixed mask, and every other time a new mask."""
        super().step(gradient, factor)
        if not self._frozen and self._steps % _MASK_STEPS == 0:
            self._exchange()

    def weight(self) -> Tensor:
        """The weights that a forward sees now, (rows, C) fp32."""
        return self._weight if self._frozen else self._weight * self._mask

    def freeze(self) -> None:
        """Fixes the mask: pruned weights are 0 from now on."""
        if not self._frozen:
            self._exchange()
            self._weight.mul_(self._mask)
            self._first.mul_(self._mask)
            self._frozen = True

    def _exchange(self) -> None:
        score = (self._weight * self._scale).abs_()
        score.mul_(torch.where(self._mask, _ADVANTAGE, 1.0))
        self._mask = keep_mask(self._pattern, score)

    def _restrict(self, gradient: Tensor) -> None:
        if self._frozen:
            super()._restrict(gradient)

    def _slowed(self, spread: Tensor) -> Tensor:
        if self._frozen:
            return spread
        return spread.mul_(torch.where(self._mask, 1.0, 1 / _HIDDEN_RATE))


def first_rate(square_sum: float, kept: int, share: float) -> float:
    """The first learning rate of a layer: `share` of the root mean square of its kept weights.

    square_sum: of the layer's `kept` weights.
    """
    return share * math.sqrt(square_sum / max(kept, 1))
