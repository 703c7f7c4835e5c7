"""The exchange of ranks that are threads of one process; its sums are those of `Collective`."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from storage.errors import WorkerLostError


class Meeting:
    """Where the ranks of a process hand each other their tensors."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._barrier = threading.Barrier(world)
        self._given: list[Sequence[Tensor]] = [()] * world

    def all_of(self, rank: int, given: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """What every rank has given, by rank. Returns when all have.

        Raises `WorkerLostError` after `abandon`.
        """
        self._given[rank] = given
        self._wait()
        everything = list(self._given)
        # Nobody gives anew before all have taken.
        self._wait()
        return everything

    def abandon(self) -> None:
        """Ends the wait of all ranks: one of them has failed."""
        self._barrier.abort()

    def _wait(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError as error:
            raise WorkerLostError("another rank of this process has failed") from error


class InProcess:
    """One rank's membership: the methods of `Collective` that a reconstruction calls."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in rank order, written into `tensor`."""
        parts = [given[0] for given in self._meeting.all_of(self._rank, [tensor.clone()])]
        return tensor.copy_(_in_order(parts))

    def swap(
        self, joined: Tensor, parts: Sequence[int], sizes: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """By rank, what it has for this one."""
        mine = torch.split(joined, list(parts))
        return tuple(given[self._rank] for given in self._meeting.all_of(self._rank, mine))

    def gather_parts(self, part: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """By rank, the `part` (sizes[rank],) of every one."""
        return [given[0] for given in self._meeting.all_of(self._rank, [part])]


def _in_order(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
