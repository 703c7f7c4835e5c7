"""What ranks exchange in each step: gradients to the owners of rows, and their new weights to all.

An owner gets the gradient of every sequence by itself and adds them in the order of the sequences.
So the division of the sequences over ranks does not show, and what is sent is no larger than the
gradients: a rank has few sequences in a step. Large layers are exchanged one by one, which bounds
the memory of it, and small ones together (`bundles`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipeline.reconstruct import schedule
from pipeline.runtime.split import even_range, in_passes


class Exchange(Protocol):
    """The membership of a rank in the group of all: `Collective`, or `InProcess`."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in rank order, written into `tensor`."""
        ...

    def swap(
        self, joined: Tensor, parts: Sequence[int], sizes: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """By rank, (sizes[rank],) bytes that it has for this one.

        joined: what this one has for each rank, of `parts` bytes, one after the other.
        """
        ...

    def gather_parts(self, part: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """By rank, the `part` (sizes[rank],) of every one."""
        ...


def rows_of(rows: int, rank: int, world: int) -> slice:
    """Which of a layer's rows a rank owns: consecutive ones, as even as can be."""
    return slice(*even_range(rows, rank, world))


def bundles(layers: Mapping[str, tuple[int, Hashable]]) -> list[list[str]]:
    """Layers that are exchanged together, in order: of small ones a call costs more than bytes do.

    layers: name -> the bytes of a gradient, and its dtypes, which are the same in a bundle. One has
    at most `BUNDLE_BYTES`, or a single layer, which bounds the memory of an exchange.
    """
    alike: list[dict[str, int]] = []
    last: Hashable = None
    for name, (size, dtypes) in layers.items():
        if not alike or dtypes != last:
            alike.append({})
        alike[-1][name], last = size, dtypes
    return [bundle for sizes in alike for bundle in in_passes(sizes, schedule.BUNDLE_BYTES)]


def to_owner(
    layers: Sequence[Sequence[Tensor]], counts: Sequence[int], rank: int, peers: Exchange | None
) -> list[Tensor]:
    """Of each layer of a bundle the sum of all sequences' gradients, (rows, C) fp32, own rows.

    layers: of each its gradients, (R, C) each, of this rank's sequences in a step, in their order;
    with none, a single one of (0, R, C). counts: how many sequences each rank has.
    """
    world = len(counts)
    if peers is None or world == 1:
        return [in_order(gradients) for gradients in layers]
    shapes = [gradients[0].shape[-2:] for gradients in layers]
    # By owner, then by layer, then by sequence.
    joined = torch.cat(
        [
            gradient[..., rows_of(rows, each, world), :].reshape(-1)
            for each in range(world)
            for (rows, _), gradients in zip(shapes, layers, strict=True)
            for gradient in gradients
        ]
    )
    dtype, size = joined.dtype, joined.element_size()
    ones = [
        size * sum(_count(rows, each, world) * columns for rows, columns in shapes)
        for each in range(world)
    ]
    received = peers.swap(
        # As bytes: not every backend knows every dtype.
        joined.view(torch.uint8),
        [counts[rank] * one for one in ones],
        [count * ones[rank] for count in counts],
    )
    own = [(_count(rows, rank, world), columns) for rows, columns in shapes]
    # By layer, then by rank, the gradients of its sequences.
    pieces = [
        torch.split(part.view(dtype), [count * math.prod(shape) for shape in own])
        for part, count in zip(received, counts, strict=True)
    ]
    return [
        in_order(
            [g for part, n in zip(each, counts, strict=True) for g in part.view(n, *shape).unbind()]
        )
        for shape, each in zip(own, zip(*pieces, strict=True), strict=True)
    ]


def in_order(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of gradients (R, C), one added after the other, in fp32."""
    total = gradients[0].to(torch.float32, copy=True)
    for gradient in gradients[1:]:
        total += gradient
    return total


def to_all(
    own: Sequence[Tensor], weights: Sequence[Tensor], world: int, peers: Exchange | None
) -> None:
    """Fills the layers of a bundle from the rows that each rank owns.

    own: of each layer this rank's rows (r, C), of one dtype. weights: the layers, (R, C) each.
    """
    if peers is None or world == 1:
        for weight, rows in zip(weights, own, strict=True):
            weight.copy_(rows)
        return
    mine, dtype = torch.cat([part.reshape(-1) for part in own]), own[0].dtype
    shares = [
        [weight[rows_of(len(weight), each, world)] for weight in weights] for each in range(world)
    ]
    sizes = [sum(rows.numel() for rows in share) * mine.element_size() for share in shares]
    gathered = peers.gather_parts(mine.view(torch.uint8), sizes)
    for part, share in zip(gathered, shares, strict=True):
        pieces = torch.split(part.contiguous().view(dtype), [rows.numel() for rows in share])
        for rows, piece in zip(share, pieces, strict=True):
            rows.copy_(piece.view(rows.shape))


def _count(rows: int, rank: int, world: int) -> int:
    """How many of a layer's rows a rank owns."""
    start, stop = even_range(rows, rank, world)
    return stop - start


def summed(values: Sequence[float], peers: Exchange | None, device: torch.device) -> list[float]:
    """The sums of `values` over the ranks. Each value is given by one rank; the others give 0."""
    total = torch.tensor(values, dtype=torch.float64)
    if peers is None or not len(total):
        return total.tolist()
    return peers.sum(total.to(device)).tolist()
