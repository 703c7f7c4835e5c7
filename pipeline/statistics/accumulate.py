"""Summing a group's second moments batch by batch, so that no layer's activations are kept.

The one Hessian convention: sum of x xᵀ over tokens, and the token count; who uses it divides.

Which sequences a batch holds does not depend on the workers, so a batch's products have the same
bytes whoever computes them, in fp32. They are added in float64, where the order of adding all but
never shows: a product differs from what was added by it only where it is less than 2⁻²⁹ of the sum,
and by so little that the sum's fp32 rounding changes in one of 2²⁹ such cases. So the
statistics, and all that follows from them, are those of the calibration, not of its workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.solvers.hessian import joined
from pipeline.solvers.types import Statistics

# Dtypes whose products are exact in TF32's 10-bit mantissa, and so in its fp32 sums.
_EXACT_IN_TF32 = (torch.bfloat16, torch.float16)
_SMALLEST_PANEL = 256
# Rows added at a time.
_STRIP = 128


@dataclass
class Sums:
    """Running sums for one group of layers, float64: what `Statistics` are made of.

    columns: C. diagonal: (C,), empty where there is a matrix. matrix: of each of `panels`, the
    columns `start:stop` of the upper triangle, (stop, stop - start) in one flat tensor, panel
    after panel; empty where the solver asks for the diagonal only. inputs: in place of the matrix,
    while they are fewer than C, an expert's inputs themselves, a tensor (n, C) for each batch in
    order; None where there is a matrix.
    """

    columns: int
    tokens: int
    sequences: int
    diagonal: Tensor
    matrix: Tensor
    inputs: list[Tensor] | None = None

    def tensors(self) -> tuple[Tensor, Tensor]:
        """What is summed over ranks."""
        return self.diagonal, self.matrix

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in (*self.tensors(), *(self.inputs or ())))

    def add(self, x_TC: Tensor) -> None:
        """Adds inputs (tokens, C) of any float dtype, all of them of one batch."""
        self.tokens += x_TC.shape[0]
        if self.inputs is not None:
            self.inputs.append(x_TC.clone())
            if self.tokens >= self.columns:
                self.spill()
        else:
            self._multiply(x_TC)

    def spill(self) -> None:
        """Makes the matrix of inputs that were kept: the bytes that it would have had all along."""
        kept, self.inputs = self.inputs or [], None
        self.matrix = self.matrix.new_zeros(_matrix_entries(self.columns))
        for x_TC in kept:
            self._multiply(x_TC)

    def kept(self) -> Tensor:
        """The inputs that were kept, (tokens, C) fp32."""
        parts = [x_TC.float() for x_TC in self.inputs or ()]
        return torch.cat([self.diagonal.new_empty(0, self.columns, dtype=torch.float32), *parts])

    def _multiply(self, x_TC: Tensor) -> None:
        exact = x_TC.dtype in _EXACT_IN_TF32
        x_TC = x_TC.to(torch.float32)
        if not self.matrix.numel():
            self.diagonal += x_TC.square().sum(dim=0)
            return
        with _tf32(exact and x_TC.is_cuda):
            for (start, stop), panel in panels_of(self.matrix, self.columns):
                # Columns start:stop of the upper triangle: the mirrored half is never computed.
                _add_in_strips(panel, x_TC[:, :stop].T @ x_TC[:, start:stop])

    def statistics(self) -> Statistics:
        """The sums in fp32, the matrix whole."""
        inputs = None if self.inputs is None else self.kept()
        hessian, diagonal = None, self.diagonal.float()
        if inputs is not None:
            diagonal = inputs.square().sum(dim=0)
        elif self.matrix.numel():
            hessian = self._whole()
            diagonal = hessian.diagonal().clone()
        return Statistics(
            columns=self.columns,
            tokens=self.tokens,
            sequences=self.sequences,
            diagonal=diagonal,
            hessian=hessian,
            inputs=inputs,
        )

    def _whole(self) -> Tensor:
        hessian = self.matrix.new_empty(self.columns, self.columns, dtype=torch.float32)
        for (start, stop), panel in panels_of(self.matrix, self.columns):
            hessian[:stop, start:stop] = panel
            hessian[start:stop, :start] = hessian[:start, start:stop].T
        return hessian


class Accumulator:
    """Adds up the inputs of one group of layers on `device`.

    `needs` is what the solver asks for: "diagonal" keeps a vector (C,), "full" a matrix of which
    only the upper triangle of panels is summed. Products are fp32. keep: whether the inputs stand
    for the matrix while they are fewer than C.
    """

    def __init__(self, columns: int, needs: str, device: torch.device, keep: bool = False) -> None:
        self.columns = columns
        full = needs == "full"
        keep = keep and full
        entries = _matrix_entries(columns) if full and not keep else 0
        shapes = (0 if full else columns), entries
        diagonal, matrix = (torch.zeros(n, dtype=torch.float64, device=device) for n in shapes)
        self.sums = Sums(columns, 0, 0, diagonal, matrix, [] if keep else None)

    def add(self, inputs: Tensor, sequences: int) -> None:
        """Adds `inputs` (..., C), any float dtype, that come from `sequences` sequences."""
        self.sums.sequences += sequences
        self.sums.add(inputs.reshape(-1, self.columns))

    def statistics(self) -> Statistics:
        """The sums so far."""
        return self.sums.statistics()


def _add_in_strips(total: Tensor, product: Tensor) -> None:
    """total += product, without a float64 copy of the whole product."""
    for start in range(0, total.shape[0], _STRIP):
        total[start : start + _STRIP] += product[start : start + _STRIP]


HalvedSums = tuple[Sums, ...]
"""One group's sums: of all sequences, or of their first and second half."""

HalvedStatistics = tuple[Statistics, ...]
"""One group's statistics: of all sequences, or of their first and second half."""


class GroupAccumulator:
    """A group's running sums: one `Accumulator`, or two for the halves of the sequences.

    `boundary` is the number of the first sequence of the second half; None for one sum. Which half
    a sequence is in depends on its number alone, so not on the ranks. `keep` as for `Accumulator`.
    """

    def __init__(
        self,
        columns: int,
        needs: str,
        device: torch.device,
        boundary: int | None,
        keep: bool = False,
    ) -> None:
        halves = 1 if boundary is None else 2
        self.halves = [Accumulator(columns, needs, device, keep) for _ in range(halves)]
        self._columns, self._boundary = columns, boundary
        self._start, self._size, self._length = 0, 1, 1

    def begin_batch(self, start: int, size: int, length: int) -> None:
        """The inputs that follow come from sequences `start : start + size` of `length` tokens."""
        self._start, self._size, self._length = start, size, length

    def add(self, inputs: Tensor, tokens: Tensor | None = None) -> None:
        """Adds inputs (..., C) of the current batch, its sequences one after another.

        tokens: (n,) int64, where the inputs (n, C) are some of the batch's tokens: their numbers,
        ascending.
        """
        first = self._size
        if self._boundary is not None:
            first = min(max(self._boundary - self._start, 0), self._size)
        if tokens is not None:
            sequences = tokens // self._length
            cut = int((sequences < first).sum())
            for half, own in zip(self.halves, (slice(0, cut), slice(cut, None)), strict=False):
                if len(inputs[own]):
                    half.add(inputs[own], len(torch.unique(sequences[own])))
            return
        x_STC = inputs.reshape(self._size, -1, self._columns)
        for half, part in zip(self.halves, (x_STC[:first], x_STC[first:]), strict=False):
            if part.shape[0]:
                half.add(part, part.shape[0])

    def sums(self) -> HalvedSums:
        """The sums so far."""
        return tuple(half.sums for half in self.halves)


def merged(halves: HalvedStatistics) -> Statistics | None:
    """The statistics of all sequences; None where none were kept."""
    if len(halves) < 2:
        return halves[0] if halves else None
    return joined(*halves)


def statistics_bytes(columns: int, needs: str) -> int:
    """What an `Accumulator` holds, in bytes."""
    return 8 * (_matrix_entries(columns) if needs == "full" else columns)


def _matrix_entries(columns: int) -> int:
    return sum(stop * (stop - start) for start, stop in panels(columns))


def panels_of(matrix: Tensor, columns: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Of a flat `Sums.matrix`, each panel's column range and its (stop, stop - start) entries."""
    at = 0
    for start, stop in panels(columns):
        entries = stop * (stop - start)
        yield (start, stop), matrix[at : at + entries].view(stop, stop - start)
        at += entries


def panels(columns: int) -> list[tuple[int, int]]:
    """Column ranges of at least 256 columns, at most eight: eight save 44 % of the products."""
    width = max(_SMALLEST_PANEL, -(-columns // 8))
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def add_in_rank_order(parts: Sequence[Sums]) -> Sums:
    """The sum of the ranks' sums, added in rank order; the parts are left as they are."""
    first = parts[0]
    tokens = sum(part.tokens for part in parts)
    parts = [dataclasses.replace(part) for part in parts]
    if stays_kept(first.columns, tokens, [part.inputs is not None for part in parts]):
        inputs = [x_TC for part in parts for x_TC in part.inputs or ()]
        sequences = sum(part.sequences for part in parts)
        return Sums(first.columns, tokens, sequences, *first.tensors(), inputs)
    for part in parts:
        if part.inputs is not None:
            part.spill()
    first = parts[0]
    diagonal, matrix = (tensor.clone() for tensor in first.tensors())
    for part in parts[1:]:
        diagonal += part.diagonal
        matrix += part.matrix
    return Sums(
        columns=first.columns,
        tokens=tokens,
        sequences=sum(part.sequences for part in parts),
        diagonal=diagonal,
        matrix=matrix,
    )


def stays_kept(columns: int, tokens: int, kept: Sequence[bool]) -> bool:
    """Whether the ranks' inputs are put together as they are, and not as products.

    tokens: of all ranks; kept: of each rank, whether it has kept its own.
    """
    return all(kept) and tokens < columns


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """TF32 products while inside, where `allowed`: for inputs that it represents exactly."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
