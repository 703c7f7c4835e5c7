"""The loss of a block's output, and its gradients with respect to weights, of one sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Of the median square of a sequence's tokens: the least one that an error is compared with.
_LEAST_SIZE = 1e-3

Run = Callable[[Tensor], Tensor]
"""A block's forward pass: (1, seqlen, hidden) -> the same shape."""


def relative_error(output: Tensor, target: Tensor, counted: Tensor | None = None) -> Tensor:
    """The mean over tokens of |output - target|^2 / |target|^2, a scalar fp32.

    From some block on, residual streams hold a few tokens that are a thousand times larger than the
    others. In a mean of squared errors nothing else would count. output, target: (1, seqlen,
    hidden). counted: (1, seqlen) bool, the tokens to take the mean of; None for all; 0 where there
    is none. A token that is very small beside the others is taken to be larger.
    """
    wanted = target.float()
    size = wanted.square().mean(dim=-1)
    least = _LEAST_SIZE * size.median() + torch.finfo(torch.float32).tiny
    error = (output.float() - wanted).square().mean(dim=-1) / torch.maximum(size, least)
    if counted is None:
        return error.mean()
    return (error * counted).sum() / counted.sum().clamp(min=1)


def gradients(
    run: Run,
    weights: Sequence[Tensor],
    inputs: Tensor,
    target: Tensor,
    counted: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The loss of one sequence, fp32, and its gradient for each of `weights`, in their dtypes.

    The gradients are those of the loss times a number that only the shape decides: with float16
    they would underflow without it. Adam does not depend on it.

    A weight that the sequence does not reach (an expert's) has a gradient of zeros. inputs, target:
    (1, seqlen, hidden); inputs may be changed by the block.
    """
    with torch.enable_grad():
        loss = relative_error(run(inputs), target, counted)
        # The sum over the elements, divided by the root of the number of tokens.
        scale = target.numel() / target.shape[1] ** 0.5
        found: Any = torch.autograd.grad(loss * scale, list(weights), allow_unused=True)
    pairs = zip(weights, found, strict=True)
    return loss.detach(), [torch.zeros_like(w) if g is None else g for w, g in pairs]
