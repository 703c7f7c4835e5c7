"""The layers that are pruned: nn.Linear, and transformers' Conv1D, which GPT-2 keeps transposed.

Everywhere in prox24 a layer's weight is (R, C): out features by in features. Only reading from and
writing to the source's weight files and modules knows that a Conv1D holds (C, R).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from torch import Tensor, nn

from pipeline.models.roles.block_roles import LINEAR_CLASSES, roles_of


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

    Those that choose or weigh experts, or are never called, are left out: they stay dense.
    """
    dense = roles_of(block).layers
    return {
        name: linear_shape(m)
        for name, m in block.named_modules()
        if is_linear(m) and name not in dense
    }


def dense_weights(block: nn.Module) -> dict[str, str]:
    """What of a block is never pruned -> why: linear layers, and all else that has two or more
    dimensions, by path in the block."""
    roles = roles_of(block)
    return roles.layers | roles.parameters


def unsupported_parameters(block: nn.Module) -> list[str]:
    """Matrices of a block that are no linear layer's weight, and would stay dense unseen."""
    return list(roles_of(block).refused)


def unsupported_reason(block: nn.Module, names: Sequence[str]) -> str:
    """Why the parameters `names` of a block, its `unsupported_parameters`, cannot be pruned."""
    return f"{names[0]} {roles_of(block).refused[names[0]]}"
