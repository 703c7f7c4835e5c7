"""What ranks exchange in each step: gradients to the owners of rows, and their new weights to all.

An owner gets the gradient of every sequence by itself and adds them in the order of the sequences.
So the division of the sequences over ranks does not show, and what is sent is no larger than the
gradients: a rank has few sequences in a step. Layers are exchanged one by one, which
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

    def swap(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """By rank, (sizes[rank],) bytes that it has for this one. parts: what this has for it."""
        ...

    def gather_parts(self, part: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """By rank, the `part` (sizes[rank],) of every one."""
        ...


def rows_of(rows: int, rank: int, world: int) -> slice:
    """Which of a layer's rows a rank owns: consecutive ones, as even as can be."""
    return slice(*even_range(rows, rank, world))


def to_owner(
    gradients: Sequence[Tensor], counts: Sequence[int], rank: int, peers: Exchange | None
) -> Tensor:
    """A layer's sum of the gradients of all sequences, (rows, C) fp32, of this rank's rows.

    gradients: (R, C) of this rank's sequences in a step, in their order; with none, of any shape
    (0, R, C). counts: how many sequences each rank has.
    """
    rows, columns = gradients[0].shape[-2:]
    world = len(counts)
    own = rows_of(rows, rank, world)
    if peers is None or world == 1:
        return in_order(gradients)
    mine = torch.stack(list(gradients)) if counts[rank] else gradients[0]
    parts = [
        mine[:, rows_of(rows, each, world)].reshape(-1).view(torch.uint8) for each in range(world)
    ]
    one = (own.stop - own.start) * columns * mine.element_size()
    received = peers.swap(parts, [count * one for count in counts])
    return in_order(
        [
            sequence
            for part, count in zip(received, counts, strict=True)
            for sequence in part.view(mine.dtype).view(count, own.stop - own.start, columns)
        ]
    )


def in_order(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of gradients (R, C), one added after the other, in fp32."""
    total = gradients[0].to(torch.float32, copy=True)
    for gradient in gradients[1:]:
        total += gradient
    return total


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
