"""Training a pruned model further without losing its zeros."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from pipeline.linears import as_held, is_linear
from pipeline.solvers import Pattern


def masks_of(model: nn.Module, pattern: str = "2:4") -> dict[str, Tensor]:
    """The support of every linear that obeys `pattern`: name -> (R, C) bool, True where not zero.

    Layers that are dense, or whose width the pattern does not divide, are left out. Raises
    `ConfigError` for a pattern that cannot be read.
    """
    wanted = Pattern.parse(pattern)
    masks = {}
    for name, module in model.named_modules():
        if is_linear(module):
            weight = as_held(module, module.weight.detach())
            fits = not wanted.structured or weight.shape[1] % wanted.group == 0
            if fits and wanted.holds(weight):
                masks[name] = weight != 0
    return masks


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
        modules = {name: model.get_submodule(name) for name in self._masks}
        self._masks = {name: as_held(modules[name], mask) for name, mask in self._masks.items()}
        self._weights = {name: module.weight for name, module in modules.items()}

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer right after `optimizer.step()`."""
        for name, mask in self._masks.items():
            weight = self._weights[name]
            if not isinstance(weight, Tensor):
                continue
            # Not a product: infinity times zero is NaN.
            weight.masked_fill_(~mask.to(weight.device), 0)
