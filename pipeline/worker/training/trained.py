"""A parameter of a block that is trained, as a matrix of rows that ranks own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pipeline.models.linears import as_held


@dataclass(frozen=True)
class Trained:
    """parameter: of a linear layer, or a vector of a norm. linear: the layer, None for a norm."""

    parameter: nn.Parameter
    linear: nn.Module | None

    @classmethod
    def of(cls, block: nn.Module, name: str) -> Trained:
        """What a block has at `name`: the path of a linear layer, or of a norm's parameter."""
        linear = dict(block.named_modules()).get(name)
        if linear is None:
            return cls(block.get_parameter(name), None)
        return cls(linear.get_parameter("weight"), linear)

    def as_matrix(self, held: Tensor) -> Tensor:
        """A tensor of the parameter's shape as (R, C), a view; (n, 1) of a vector (n,)."""
        return held.view(-1, 1) if self.linear is None else as_held(self.linear, held)
