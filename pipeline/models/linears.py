"""The layers that are pruned: nn.Linear, and transformers' Conv1D, which GPT-2 keeps transposed.

Everywhere in prox24 a layer's weight is (R, C): out features by in features. Only reading from and
writing to the source's weight files and modules knows that a Conv1D holds (C, R).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.models.experts import routers

LINEAR_CLASSES: tuple[Any, ...] = (nn.Linear, Conv1D)


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module's `weight` is a matrix that its input is multiplied with."""
    return isinstance(module, LINEAR_CLASSES)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer holds its weight as (C, R)."""
    return isinstance(module, LINEAR_CLASSES[1:])


def linear_shape(module: nn.Linear) -> tuple[int, int]:
    """(R, C) of a linear layer, out features by in features."""
    rows, columns = module.weight.shape
    return (int(columns), int(rows)) if is_transposed(module) else (int(rows), int(columns))


def as_held(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight (R, C) as `module` and its weight file hold it, or such a one as (R, C): a view."""
    return weight.T if is_transposed(module) else weight


def linear_layers(block: nn.Module) -> dict[str, tuple[int, int]]:
    """Module path -> (out features R, in features C) of every linear layer of a block.

    Those that route tokens to experts are left out: they stay dense.
    """
    dense = routers(block)
    return {
        name: linear_shape(m)
        for name, m in block.named_modules()
        if is_linear(m) and id(m) not in dense
    }


def unsupported_parameters(block: nn.Module) -> list[str]:
    """Matrices of a block that are no linear layer's weight, and would stay dense unseen."""
    dense = routers(block)
    # A router may be a module around others, without a weight of its own.
    of_linears = (m for m in block.modules() if is_linear(m) or id(m) in dense)
    known = {id(getattr(m, "weight", None)) for m in of_linears}
    return [name for name, p in block.named_parameters() if p.dim() >= 2 and id(p) not in known]


def unsupported_reason(block: nn.Module, names: Sequence[str]) -> str:
    """Why the parameters `names` of a block, its `unsupported_parameters`, cannot be pruned."""
    for name in names:
        if block.get_parameter(name).dim() == 3:
            return (
                f"{name} has three dimensions (a stack of experts, or a convolution) and is "
                "computed in a way that prox24 cannot take apart"
            )
    return f"{names[0]} is a weight matrix outside linear layers, which prox24 cannot prune"
