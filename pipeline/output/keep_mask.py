"""Training a pruned model further without losing its zeros."""

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
    """The support of every linear that obeys `pattern`: name -> (R, C) bool, True where not zero;
    and of stacked experts, parameter -> (experts, R, C).

    Layers that are dense, or whose width the pattern does not divide, are left out. Raises
    `ConfigError` for a pattern that cannot be read.
    """
    wanted = Pattern.parse(pattern)
    masks = {}
    for name, held, turn in _matrices(model):
        weight = turn(held.detach())
        rows = weight.reshape(-1, weight.shape[-1])
        fits = not wanted.structured or rows.shape[1] % wanted.group == 0
        if fits and holds(wanted, rows):
            masks[name] = weight != 0
    return masks


def _matrices(model: nn.Module) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    """Name and parameter of all that may be pruned, linears and stacked experts, and what turns it
    into (..., R, C), or such a one into the parameter's layout."""
    for path, module in model.named_modules():
        if is_linear(module):
            yield path, module.weight, partial(as_held, module)
        for name in stacked_weights(module):
            turn = _transposed if holds_transposed(module) else _as_it_is
            yield f"{path}.{name}", module.get_parameter(name), turn


def _transposed(weight: Tensor) -> Tensor:
    return weight.mT


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


class KeepMask(TrainerCallback):  # type: ignore[misc]
    """Sets what was pruned back to zero after every step of the optimizer, exactly.

    Gradients are accumulated as usual; an entry outside the mask may move in the step itself (its
    gradient, momentum or decay is not zero), and is 0 before anything reads it again. Works with
    any optimizer and dtype, and adds one pass over the masked weights to a step.
    """

    def __init__(self, model: nn.Module, pattern: str = "2:4") -> None:
        """Takes the masks from `model` as it is. Raises `ValueError` where nothing is pruned."""
        self._masks = masks_of(model, pattern)
        if not self._masks:
            raise ValueError(f"no linear of this model obeys {pattern}: it is not pruned")
        self._weights = {}
        for name, weight, turn in _matrices(model):
            if name in self._masks:
                self._weights[name] = weight
                self._masks[name] = turn(self._masks[name])

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer right after `optimizer.step()`."""
        for name, mask in self._masks.items():
            weight = self._weights[name]
            # Not a product: infinity times zero is NaN.
            weight.masked_fill_(~mask.to(weight.device), 0)
