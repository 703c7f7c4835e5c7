"""A layer that is part of a stored tensor: one expert of a stack of all a block's experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from storage.model.files import ModelFiles


@dataclass(frozen=True)
class ExpertPart:
    """One expert's weight, or bias, in a stored tensor whose first dimension counts the experts.

    tensor: its name in the weight files. index: the expert's number. transposed: whether the files
    have the weight (R, C) as (C, R).
    """

    tensor: str
    index: int
    transposed: bool = False

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the weight in a tensor of shape `whole`; empty where that has no parts."""
        own = whole[1:] if whole and self.index < whole[0] else ()
        return own[::-1] if self.transposed else own

    def read(self, files: ModelFiles) -> Tensor:
        """The weight (R, C), or bias (R,), on the CPU, as stored. Errors as `ModelFiles.read`."""
        own = files.read(self.tensor, rows=(self.index, self.index + 1))[0]
        return own.T.contiguous() if self.transposed else own

    def as_stored(self, weight: Tensor) -> Tensor:
        """A weight (R, C) as it is written into the tensor: (1, R, C) or (1, C, R)."""
        return (weight.T if self.transposed else weight).contiguous()[None]
