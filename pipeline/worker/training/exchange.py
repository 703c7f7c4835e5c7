"""What ranks exchange in each step: gradients to the owners of rows, and their new weights to all.

Terms are added in float64. Gradients of like size have so few digits that the sums are exact, so
the division of the sequences over ranks does not show.
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


class Rows:
    """Which rows of each layer each rank owns: consecutive ones, as even as can be.

    shapes, dtypes: layer -> (R, C) and the dtype that its weight is stored in, of the trained
    layers, in the order in which they are sent.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, int]],
        dtypes: dict[str, torch.dtype],
        rank: int,
        world: int,
    ) -> None:
        self.shapes, self.dtypes, self.rank, self.world = shapes, dtypes, rank, world

    def of(self, layer: str, rank: int | None = None) -> slice:
        """The rows of a layer that a rank owns; this one by default."""
        owner = self.rank if rank is None else rank
        return slice(*even_range(self.shapes[layer][0], owner, self.world))

    def count(self, layer: str, rank: int) -> int:
        """Number of a layer's weights that a rank owns."""
        rows, columns = self.shapes[layer]
        start, stop = even_range(rows, rank, self.world)
        return (stop - start) * columns


def to_owners(
    sums: dict[str, Tensor], rows: Rows, collective: Exchange | None
) -> dict[str, Tensor]:
    """Each layer's sums over all ranks (rows, C) fp32, of the rows that this rank owns.

    sums: layer -> (R, C) float64, over this rank's sequences.
    """
    if collective is None or rows.world == 1:
        return {layer: total.float() for layer, total in sums.items()}
    parts = [
        torch.cat([sums[layer][rows.of(layer, rank)].reshape(-1) for layer in rows.shapes])
        for rank in range(rows.world)
    ]
    total = collective.sum_parts(parts).float()
    counts = [rows.count(layer, rows.rank) for layer in rows.shapes]
    pieces = zip(rows.shapes.items(), torch.split(total, counts), strict=True)
    return {layer: piece.view(-1, columns) for (layer, (_, columns)), piece in pieces}


def to_all(
    own: dict[str, Tensor], rows: Rows, collective: Exchange | None
) -> dict[str, list[tuple[slice, Tensor]]]:
    """Each layer's rows from all ranks: (which, their values (rows, C)).

    own: layer -> the rows that this rank owns, in the dtype that the layer is stored in.
    """
    if collective is None or rows.world == 1:
        return {layer: [(rows.of(layer), values)] for layer, values in own.items()}
    flat = torch.cat([own[layer].reshape(-1).view(torch.uint8) for layer in rows.shapes])
    sizes = [
        [rows.count(layer, rank) * rows.dtypes[layer].itemsize for layer in rows.shapes]
        for rank in range(rows.world)
    ]
    found: dict[str, list[tuple[slice, Tensor]]] = {layer: [] for layer in rows.shapes}
    for rank, part in enumerate(collective.gather_parts(flat, [sum(each) for each in sizes])):
        pieces = zip(rows.shapes.items(), torch.split(part, sizes[rank]), strict=True)
        for (layer, (_, columns)), piece in pieces:
            # A copy: what precedes it may have another alignment.
            values = piece.clone().view(rows.dtypes[layer]).view(-1, columns)
            found[layer].append((rows.of(layer, rank), values))
    return found


def summed(values: Sequence[float], collective: Exchange | None, device: torch.device) -> Tensor:
    """The sum of `values` over the ranks, float64 (n,) on the CPU.

    Each value is given by one rank; the others give 0.
    """
    total = torch.tensor(values, dtype=torch.float64)
    if collective is None or not len(total):
        return total
    return collective.sum(total.to(device)).cpu()
