"""Fine-tuning of a pruned model that keeps its zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from pipeline.config.pattern import Pattern
from pipeline.models.experts import holds_transposed, stacked_weights
from pipeline.models.linears import as_held, is_linear
from pipeline.solvers.masks import holds


def masks_of(model: nn.Module, pattern: str = "2:4") -> dict[str, Tensor]:
    """The masks of all layers that obey `pattern`: True where a weight is not zero.

    Linear layers: name → (R, C) bool. Stacked experts: name of the parameter → (experts, R, C)
    bool. Layers that are dense, or whose width the pattern does not divide, are left out. Raises
    `ConfigError` for a pattern that cannot be parsed.
    """
    wanted = Pattern.parse(pattern)
    masks = {}
    for name, parameter, convert in _matrices(model):
        weight = convert(parameter.detach())
        rows = weight.reshape(-1, weight.shape[-1])
        fits = not wanted.structured or rows.shape[1] % wanted.group == 0
        if fits and holds(wanted, rows):
            masks[name] = weight != 0
    return masks


def _matrices(model: nn.Module) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    """(name, parameter, convert) of all linears and stacked experts.

    convert: a function from the parameter's layout to (..., R, C), which is its own inverse.
    """
    for path, module in model.named_modules():
        if is_linear(module):
            yield path, module.weight, partial(as_held, module)
        for name in stacked_weights(module):
            convert = _transposed if holds_transposed(module) else _unchanged
            yield f"{path}.{name}", module.get_parameter(name), convert


def _transposed(weight: Tensor) -> Tensor:
    return weight.mT


def _unchanged(weight: Tensor) -> Tensor:
    return weight


class KeepMask(TrainerCallback):  # type: ignore[misc]
    """Sets pruned weights to exactly zero after every step of the optimizer.

    Gradients are accumulated as usual. A pruned weight may change in the step itself, by its
    gradient, momentum or weight decay, and is 0 again before it is read. Works with any optimizer
    and dtype; a step takes one more pass over the masked weights.
    """

    def __init__(self, model: nn.Module, pattern: str = "2:4") -> None:
        """Takes the masks from the zeros of `model`. Raises `ValueError` if nothing is pruned."""
        self._masks = masks_of(model, pattern)
        if not self._masks:
            raise ValueError(f"no linear of this model obeys {pattern}: it is not pruned")
        self._weights = {}
        for name, weight, convert in _matrices(model):
            if name in self._masks:
                self._weights[name] = weight
                self._masks[name] = convert(self._masks[name])

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer right after `optimizer.step()`."""
        for name, mask in self._masks.items():
            weight = self._weights[name]
            # Not a product: infinity times zero is NaN.
            weight.masked_fill_(~mask.to(weight.device), 0)
