"""Teams of workers (`pipeline.solvers.types.Team`) in one process, each member a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
SECONDS = 60


class Table:
    """What the members of a team share in one process, each of them a thread."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=SECONDS)
        self.tensor: Tensor | None = None
        self.sent = 0


@dataclass(frozen=True)
class Member:
    """A `Team`, as one of its members has it."""

    index: int
    size: int
    table: Table

    def send(self, tensor: Tensor, owner: int) -> None:
        assert tensor.is_contiguous()
        if self.index == owner:
            self.table.tensor = tensor
            self.table.sent += tensor.nbytes
        self.table.barrier.wait()
        assert self.table.tensor is not None
        if self.index != owner:
            tensor.copy_(self.table.tensor)
        self.table.barrier.wait()


def together(size: int, work: Callable[[Member], T]) -> tuple[list[T], Table]:
    """What `work` returns for each member, and what they shared."""
    table = Table(size)
    with ThreadPoolExecutor(size, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        calls = [threads.submit(work, Member(index, size, table)) for index in range(size)]
        return [each.result(SECONDS) for each in calls], table
