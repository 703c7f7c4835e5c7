"""Summing a group's second moments batch by batch, so that no layer's activations are kept.

The one Hessian convention: fp32 sum of x xᵀ over tokens, and the token count; who uses it divides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.solvers.types import Statistics

# Dtypes whose products are exact in TF32's 10-bit mantissa, and so in its fp32 sums.
_EXACT_IN_TF32 = (torch.bfloat16, torch.float16)
_SMALLEST_PANEL = 256


class Accumulator:
    """Running sums for one group of layers, fp32 on `device`.

    `needs` is what the solver asks for: "diagonal" keeps a vector (C,), "full" also the matrix
    (C, C), of which only the upper triangle of panels is summed until `statistics` mirrors it.
    """

    def __init__(self, columns: int, needs: str, device: torch.device) -> None:
        self.columns = columns
        self.tokens = 0
        self.sequences = 0
        self.diagonal = torch.zeros(columns, dtype=torch.float32, device=device)
        self.hessian: Tensor | None = None
        if needs == "full":
            self.hessian = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor, sequences: int) -> None:
        """Adds `inputs` (..., C), any float dtype, that come from `sequences` sequences."""
        x_TC = inputs.reshape(-1, self.columns)
        self.tokens += x_TC.shape[0]
        self.sequences += sequences
        exact = x_TC.dtype in _EXACT_IN_TF32
        x_TC = x_TC.to(torch.float32)
        if self.hessian is None:
            self.diagonal += x_TC.square().sum(dim=0)
            return
        with _tf32(exact and x_TC.is_cuda):
            for start, stop in panels(self.columns):
                # Columns start:stop of the upper triangle: the mirrored half is never computed.
                self.hessian[:stop, start:stop].addmm_(x_TC[:, :stop].T, x_TC[:, start:stop])

    def statistics(self) -> Statistics:
        """The sums so far; the matrix is made symmetric in place."""
        if self.hessian is None:
            diagonal = self.diagonal
        else:
            for start, stop in panels(self.columns):
                self.hessian[stop:, start:stop] = self.hessian[start:stop, stop:].T
            diagonal = self.hessian.diagonal().clone()
        return Statistics(
            columns=self.columns,
            tokens=self.tokens,
            sequences=self.sequences,
            diagonal=diagonal,
            hessian=self.hessian,
        )


FoldedStatistics = tuple[Statistics, ...]
"""One group's statistics: of all sequences, or of their first and second half."""


class GroupAccumulator:
    """A group's running sums: one `Accumulator`, or two for the halves of the sequences.

    `boundary` is the number of the first sequence of the second half; None for one sum. Which half
    a sequence is in depends on its number alone, so not on the ranks.
    """

    def __init__(
        self, columns: int, needs: str, device: torch.device, boundary: int | None
    ) -> None:
        folds = 1 if boundary is None else 2
        self.folds = [Accumulator(columns, needs, device) for _ in range(folds)]
        self._columns, self._boundary = columns, boundary
        self._start, self._size = 0, 1

    def begin_batch(self, start: int, size: int) -> None:
        """The inputs that follow come from sequences `start : start + size`."""
        self._start, self._size = start, size

    def add(self, inputs: Tensor) -> None:
        """Adds inputs (..., C) of the current batch, its sequences one after another."""
        x_STC = inputs.reshape(self._size, -1, self._columns)
        first = self._size
        if self._boundary is not None:
            first = min(max(self._boundary - self._start, 0), self._size)
        for fold, part in zip(self.folds, (x_STC[:first], x_STC[first:]), strict=False):
            if part.shape[0]:
                fold.add(part, part.shape[0])

    def statistics(self) -> FoldedStatistics:
        """The sums so far."""
        return tuple(fold.statistics() for fold in self.folds)


def merged(folds: FoldedStatistics) -> Statistics | None:
    """The statistics of all sequences; None where none were kept."""
    if len(folds) < 2:
        return folds[0] if folds else None
    return add_in_rank_order(list(folds))


def statistics_bytes(columns: int, needs: str) -> int:
    """What an `Accumulator` holds, in bytes."""
    return 4 * columns * ((columns if needs == "full" else 0) + 1)


def panels(columns: int) -> list[tuple[int, int]]:
    """Column ranges of at least 256 columns, at most eight: eight save 44 % of the products."""
    width = max(_SMALLEST_PANEL, -(-columns // 8))
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def add_in_rank_order(parts: list[Statistics]) -> Statistics:
    """The sum of the ranks' statistics, added in rank order: its bytes depend on nothing else."""
    first = parts[0]
    return Statistics(
        columns=first.columns,
        tokens=sum(part.tokens for part in parts),
        sequences=sum(part.sequences for part in parts),
        diagonal=_sum([part.diagonal for part in parts]),
        hessian=_sum([part.hessian for part in parts]),
    )


def _sum(tensors: list[Tensor | None]) -> Tensor | None:
    total: Tensor | None = None
    for tensor in tensors:
        if tensor is not None:
            total = tensor.clone() if total is None else total.add_(tensor)
    return total


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """TF32 products while inside, where `allowed`: for inputs that it represents exactly."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
