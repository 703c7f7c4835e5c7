"""Sums the second moments of a group's inputs batch by batch; no activations of a layer are kept.

The one Hessian convention: the sum of x xᵀ over tokens, in fp32, and the number of tokens. Code
that needs the mean divides.

The statistics do not depend on the number of workers. The sequences of a batch do not, so the
product of a batch has the same fp32 bytes on any worker. Products are added in float64, where the
order of additions almost never matters: only a product below 2⁻²⁹ of the sum is rounded when it is
added, and the rounding changes the fp32 value of the sum in one of 2²⁹ such cases.

Shapes: T tokens of a batch, S sequences, C columns (input features).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pipeline.runtime.device import tf32_products
from pipeline.runtime.products import product
from pipeline.solvers.hessian import joined
from pipeline.solvers.types import Statistics
from storage.errors import ModelError

# Dtypes that fit into the 10-bit mantissa of TF32, so that its products are exact.
_EXACT_IN_TF32 = (torch.bfloat16, torch.float16)
_SMALLEST_PANEL = 256  # columns
_STRIP = 128  # rows that are added at a time on a CPU


@dataclass
class Sums:
    """Running sums of one group of layers, float64; `statistics` converts them.

    columns: C. tokens, sequences: how many are in the sums. diagonal: (C,), empty where there is a
    matrix. matrix: flat, panel after panel; the panel `start:stop` (see `panels`) has the rows
    `:stop` of these columns, (stop, stop - start), that is, the upper triangle. It is empty where
    the solver needs only the diagonal. inputs: an expert's inputs themselves, in place of the
    matrix while they are fewer than C: one tensor (T, C) per batch, in order; None where there is
    a matrix.
    """

    columns: int
    tokens: int
    sequences: int
    diagonal: Tensor
    matrix: Tensor
    inputs: list[Tensor] | None = None

    def tensors(self) -> tuple[Tensor, Tensor]:
        """The tensors that are summed over the workers."""
        return self.diagonal, self.matrix

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.tensors(), *(self.inputs or ())))

    def add(self, x_TC: Tensor) -> None:
        """Adds the inputs (T, C) of one batch, of any float dtype."""
        self.tokens += x_TC.shape[0]
        if self.inputs is not None:
            self.inputs.append(x_TC.clone())
            if self.tokens >= self.columns:
                self.spill()
        else:
            self._multiply(x_TC)

    def spill(self) -> None:
        """Replaces the kept inputs by the matrix, which gets the bytes as if none had been kept."""
        kept, self.inputs = self.inputs or [], None
        self.matrix = self.matrix.new_zeros(_matrix_entries(self.columns))
        for x_TC in kept:
            self._multiply(x_TC)

    def kept(self) -> Tensor:
        """The kept inputs, (tokens, C) fp32."""
        parts = [x_TC.float() for x_TC in self.inputs or ()]
        return torch.cat([self.diagonal.new_empty(0, self.columns, dtype=torch.float32), *parts])

    def squares(self) -> Tensor:
        """The sums of squares (C,) in fp32, as solvers get them.

        If they are finite, so are all sums: |H_ij| is at most the mean of H_ii and H_jj.
        """
        if self.inputs is not None:
            zero = self.diagonal.new_zeros(self.columns, dtype=torch.float32)
            return sum((x_TC.float().square().sum(dim=0) for x_TC in self.inputs), zero)
        if not self.matrix.numel():
            return self.diagonal.float()
        parts = panels_of(self.matrix, self.columns)
        return torch.cat([panel[start:].diagonal() for (start, _), panel in parts]).float()

    def _multiply(self, x_TC: Tensor) -> None:
        exact = x_TC.dtype in _EXACT_IN_TF32
        x_TC = x_TC.to(torch.float32)
        if not self.matrix.numel():
            self.diagonal += x_TC.square().sum(dim=0)
            return
        with tf32_products(exact and x_TC.is_cuda):
            for (start, stop), panel in panels_of(self.matrix, self.columns):
                # Columns start:stop of the upper triangle; the lower one is never computed.
                _add(panel, product(x_TC[:, :stop].T, x_TC[:, start:stop]))

    def statistics(self) -> Statistics:
        """The sums rounded to fp32, with the full symmetric matrix."""
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
    """Sums the second moments of the inputs of one group of layers on `device`.

    columns: C. needs: the statistic of the solver: "diagonal" is a vector (C,), "full" the upper
    triangle of a matrix, in panels. Products are fp32, sums float64. keep: whether the inputs are
    kept in place of the matrix while they are fewer than C.
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
        """Adds `inputs` (..., C), any float dtype, from `sequences` sequences, as one batch."""
        self.sums.sequences += sequences
        self.sums.add(inputs.reshape(-1, self.columns))

    def statistics(self) -> Statistics:
        """The sums so far."""
        return self.sums.statistics()


def _add(total: Tensor, product: Tensor) -> None:
    """total += product, float64 and fp32, without a float64 copy of the whole product.

    On a CPU torch makes such a copy of what is added, so strips are added there. On a GPU it
    converts each entry as it is read, in one kernel (TensorIterator::compute_types).
    """
    rows = _STRIP if total.device.type == "cpu" else total.shape[0]
    for start in range(0, total.shape[0], rows):
        # Not `+=`: Python would then also assign the strip to itself, which is a copy.
        total[start : start + rows].add_(product[start : start + rows])


HalvedSums = tuple[Sums, ...]
"""Sums of one group: one of all sequences, or two, of the first and the second half."""

HalvedStatistics = tuple[Statistics, ...]
"""Statistics of one group: one of all sequences, or two, of the first and the second half."""


@dataclass(frozen=True)
class Batch:
    """The sequences `start : start + size` of the calibration, of `length` tokens each.

    counted: (size * length,) bool, on the device of the layers' inputs: the tokens that statistics
    are taken of; None for all.
    """

    start: int
    size: int
    length: int
    counted: Tensor | None = None

    @cached_property
    def counted_tokens(self) -> Tensor | None:
        """(T,) int64 ascending, the numbers in the batch of the tokens that count."""
        return None if self.counted is None else self.counted.nonzero()[:, 0]


class GroupAccumulator:
    """The running sums of a group: one `Accumulator`, or two for two halves of the sequences.

    boundary: index of the first sequence of the second half; None for a single sum. The half of a
    sequence depends on its index alone, not on the workers. Others: as for `Accumulator`.
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
        self._batch = Batch(0, 1, 1)

    def begin_batch(self, batch: Batch) -> None:
        """Starts a batch, to which the inputs belong that are added from now on."""
        self._batch = batch

    def add(self, inputs: Tensor, tokens: Tensor | None = None) -> None:
        """Adds inputs (..., C) of the current batch, in the order of its sequences.

        tokens: (T,) int64 ascending, where the inputs (T, C) are some tokens of the batch only:
        their indices in the batch. Of a batch in which only some tokens count, these are added;
        the inputs must then have one row for each token, or for each of `tokens`. Raises
        `ModelError` where they have not.
        """
        if self._batch.counted is not None:
            inputs, tokens = self._counted(inputs, self._batch.counted, tokens)
        first = self._first_half()
        if tokens is not None:
            sequences = tokens // self._batch.length
            cut = int((sequences < first).sum())
            for half, part in zip(self.halves, (slice(0, cut), slice(cut, None)), strict=False):
                if len(inputs[part]):
                    half.add(inputs[part], len(torch.unique(sequences[part])))
            return
        x_STC = inputs.reshape(self._batch.size, -1, self._columns)
        for half, x_part in zip(self.halves, (x_STC[:first], x_STC[first:]), strict=False):
            if x_part.shape[0]:
                half.add(x_part, x_part.shape[0])

    def _first_half(self) -> int:
        """How many sequences of the batch are in the first half."""
        batch = self._batch
        if self._boundary is None:
            return batch.size
        return min(max(self._boundary - batch.start, 0), batch.size)

    def _counted(
        self, inputs: Tensor, counted: Tensor, tokens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Of the inputs of a batch, or of some of its tokens, those that count, and their tokens.

        The result is (T, C) and (T,).
        """
        rows = inputs.reshape(-1, self._columns)
        among = len(counted) if tokens is None else len(tokens)
        if len(rows) != among:
            raise ModelError(f"it has {len(rows)} inputs for {among} tokens")
        if tokens is None:
            kept = self._batch.counted_tokens
            assert kept is not None
            return rows[kept], kept
        wanted = counted[tokens]
        return rows[wanted], tokens[wanted]

    def sums(self) -> HalvedSums:
        """The sums so far."""
        return tuple(half.sums for half in self.halves)


def not_finite_sums(sums: Mapping[str, HalvedSums]) -> list[str]:
    """The groups whose sums are not finite in fp32, of the sums by group."""
    finite = [
        torch.stack([torch.isfinite(half.squares()).all() for half in halves]).all()
        for halves in sums.values()
    ]
    known = torch.stack(finite).tolist() if finite else []  # one wait for the device
    return [name for name, good in zip(sums, known, strict=True) if not good]


def merged(halves: HalvedStatistics) -> Statistics | None:
    """The statistics of all sequences, from those of the halves; None for no statistics."""
    if len(halves) < 2:
        return halves[0] if halves else None
    return joined(*halves)


def statistics_bytes(columns: int, needs: str) -> int:
    """Bytes of the sums of an `Accumulator` that keeps no inputs."""
    return 8 * (_matrix_entries(columns) if needs == "full" else columns)


def _matrix_entries(columns: int) -> int:
    return sum(stop * (stop - start) for start, stop in panels(columns))


def panels_of(matrix: Tensor, columns: int) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """The panels of a flat `Sums.matrix`: column range start:stop, view (stop, stop - start)."""
    at = 0
    for start, stop in panels(columns):
        entries = stop * (stop - start)
        yield (start, stop), matrix[at : at + entries].view(stop, stop - start)
        at += entries


def panels(columns: int) -> list[tuple[int, int]]:
    """Column ranges: at most eight, of at least 256 columns. Eight save 44 % of the products."""
    width = max(_SMALLEST_PANEL, -(-columns // 8))
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def add_in_rank_order(parts: Sequence[Sums]) -> Sums:
    """The sum of the workers' sums of one group, added in rank order.

    The parts are not changed. Without Ray it takes the place of `Collective.sum_statistics`.
    """
    first = parts[0]
    tokens = sum(part.tokens for part in parts)
    parts = [dataclasses.replace(part) for part in parts]
    if keeps_inputs(first.columns, tokens, [part.inputs is not None for part in parts]):
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


def keeps_inputs(columns: int, tokens: int, kept: Sequence[bool]) -> bool:
    """Whether the sum over workers keeps the inputs, instead of replacing them by the matrix.

    tokens: of all workers together. kept: for each worker, whether it has kept its inputs.
    """
    return all(kept) and tokens < columns
