"""What ranks exchange in each step: gradients to the owners of rows, and their new weights to all.

Terms are added in float64. Gradients of like size have so few digits that the sums are exact, so
the division of the sequences over ranks does not show. Layers are exchanged one by one, which
bounds the memory of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipeline.runtime.split import even_range


class Exchange(Protocol):
    """The membership of a rank in the group of all: `Collective`, or `InProcess`."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in rank order, written into `tensor`."""
        ...

    def sum_parts(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum over the ranks, in rank order, of what they have for this one, by rank (n,)."""
        ...

    def gather_parts(self, part: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """By rank, the `part` (sizes[rank],) of every one."""
        ...


def rows_of(rows: int, rank: int, world: int) -> slice:
    """Which of a layer's rows a rank owns: consecutive ones, as even as can be."""
    return slice(*even_range(rows, rank, world))


def to_owner(total: Tensor, rank: int, world: int, peers: Exchange | None) -> Tensor:
    """A layer's sum over all ranks, (rows, C) fp32, of the rows that this rank owns.

    total: (R, C) float64, the sum over this rank's sequences.
    """
    if peers is None or world == 1:
        return total.float()
    parts = [total[rows_of(len(total), each, world)].reshape(-1) for each in range(world)]
    return peers.sum_parts(parts).float().view(-1, total.shape[1])


def to_all(own: Tensor, rows: int, world: int, peers: Exchange | None) -> Tensor:
    """A layer of `rows` rows, (R, C), from the rows (r, C) that each rank owns, in their dtype."""
    if peers is None or world == 1:
        return own
    shares = [rows_of(rows, each, world) for each in range(world)]
    width = own.shape[1] * own.element_size()
    sizes = [(share.stop - share.start) * width for share in shares]
    # As bytes: not every backend knows every dtype.
    parts = peers.gather_parts(own.reshape(-1).view(torch.uint8), sizes)
    return torch.cat([part.contiguous().view(own.dtype) for part in parts]).view(rows, -1)


def summed(values: Sequence[float], peers: Exchange | None, device: torch.device) -> list[float]:
    """The sums of `values` over the ranks. Each value is given by one rank; the others give 0."""
    total = torch.tensor(values, dtype=torch.float64)
    if peers is None or not len(total):
        return total.tolist()
    return peers.sum(total.to(device)).tolist()
