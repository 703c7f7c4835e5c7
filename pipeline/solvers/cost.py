"""Time and memory of a solve, from shapes and settings: to split rows over workers, and for plans.

R: rows of a worker, C: columns of a group, n: inputs in place of a Hessian. A solver states its own
part by overriding methods of `Costs`, from which `base.BaseSolver` is derived.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from pipeline.config.solver import ESTIMATE, SolverSettings

# In operations at the speed of a fp32 matrix product: the elementwise work of an iteration per
# entry, and an inverse over its C^3 operations. Measured on a CPU (benchmarks/scaling.py).
_OPERATIONS_PER_ENTRY = 500.0
_INVERSE_SLOWDOWN = 2.4
# On a GPU: the blocked inverse reaches 0.55 of the peak, products 0.75.
_INVERSE_SLOWDOWN_ON_GPU = 0.75 / 0.55
# Time of a TF32 product over that of a fp32 one: 50 and 412 TFLOP/s, measured on H100 at 8,192^3.
TF32_SHARE = 50 / 412
BYTES_PER_ITERATION = 92.0
"""Read and written on a GPU per entry of the rows in one iteration of ADMM (twelve fp32 values) or
of conjugate gradients (fifteen), besides the product."""
# On a GPU: the time to start a kernel, about 5 us (measured by many on A100 and H100, with the
# host's part in torch), at an H100's rate of fp32 products, 50 TFLOP/s (measured at 8,192^3).
OPERATIONS_PER_LAUNCH = 5e-6 * 50e12
# The same for a byte read or written, at 70 % of an H100's 3.35 TB/s.
OPERATIONS_PER_BYTE = 50e12 / 2.3e12
# Of a broadcast, assumed: NVLink at 60 % of 450 GB/s, a network of 200 Gbit/s a GPU.
_BYTES_IN_A_NODE, _BYTES_BETWEEN_NODES = 270e9, 25e9
# Of a block of an inverse, assumed: its factor (1 ms), and some 20 broadcasts of 50 us.
_SECONDS_PER_BLOCK = 2e-3
INVERSE_PANEL = 512
"""Columns of a panel of the blocked inverse."""
_ENTRY_PANEL = 256


@dataclass(frozen=True)
class SolveCost:
    """Cost of solving one group of layers on one worker, in operations of a matrix product.

    fixed: operations for each worker that solves any rows of the group (factorizations). per_row:
    operations for each row. products: number of fp32 products (R, C) x (C, C) that per_row
    contains; a TF32 one counts as `TF32_SHARE`.
    """

    fixed: float
    per_row: float
    products: float

    def of(self, rows: int) -> float:
        """Operations for `rows` rows; 0 for none."""
        return self.fixed + rows * self.per_row if rows else 0.0


@dataclass(frozen=True)
class MethodCost:
    """The part of a `SolveCost` that is due to the method: no refinement, no objectives.

    products: number of products (R, C) x (C, C), in fp32 ones. fixed: operations for each worker.
    per_row: operations for each row besides the products.
    """

    products: float = 0
    fixed: float = 0.0
    per_row: float = 0.0


@dataclass(frozen=True)
class SolveCounts:
    """Work of solving one group on one worker.

    products: number of fp32 products (R, C) x (C, C). rounded: number of TF32 ones. wide: number of
    objectives, each the `objective_share` of a float64 product. All are fractions where n inputs
    are used in place of the Hessian: then a product is two with (C, n). other: further fp32
    operations of products on rows. inverse: operations of fp32 inverses, inverses: their number;
    factor: operations of the float64 factor; they are the same on every worker. steps: iterations,
    each a pass over all rows. moved: bytes read and written over C x C and over rows, outside the
    iterations. operators: number of kernels started.
    """

    products: float = 0
    rounded: float = 0
    wide: float = 0
    other: float = 0.0
    inverse: float = 0.0
    inverses: int = 0
    factor: float = 0.0
    steps: int = 0
    moved: float = 0.0
    operators: int = 0


def elementwise_operations(columns: int, device: str) -> float:
    """An iteration's work on a row of C entries besides its product; `device`: a torch type."""
    bandwidth = OPERATIONS_PER_BYTE * BYTES_PER_ITERATION
    return columns * (bandwidth if device == "cuda" else _OPERATIONS_PER_ENTRY)


def inverse_operations(columns: int, device: str) -> float:
    """An inverse of a (C, C), as operations at the speed of a product: C^3, which run slower."""
    slower = _INVERSE_SLOWDOWN_ON_GPU if device == "cuda" else _INVERSE_SLOWDOWN
    return slower * float(columns) ** 3


def together_operations(columns: int, nodes: int) -> float:
    """An inverse of a (C, C) by several GPUs: what each does besides its share, as operations.

    That is the small factor of each block, which the next steps wait for, and what is sent: each
    block's rows and columns and in the end the lower triangle, 6 C^2 bytes to each GPU in all.
    """
    seconds = together_bytes(columns) / (_BYTES_IN_A_NODE if nodes == 1 else _BYTES_BETWEEN_NODES)
    return 50e12 * (seconds + together_latency(columns))


def together_latency(columns: int) -> float:
    """Seconds of what is done block after block in an inverse that several GPUs compute."""
    return _SECONDS_PER_BLOCK * -(-columns // INVERSE_PANEL)


def together_bytes(columns: int) -> float:
    """Bytes that reach each GPU in an inverse of a (C, C) that several compute together."""
    return 6.0 * columns * columns


def objective_share(columns: int) -> float:
    """Operations of an objective as a share of a product (R, C) x (C, C).

    H is symmetric: the blocks above the diagonal count twice, those below are not multiplied.
    """
    count = -(-columns // 256)
    return (count + 1) / (2 * count)


def entry_bytes(columns: float, inputs: float) -> float:
    """Bytes held at once while H is computed from n inputs panel by panel, or for an objective."""
    return max(12.0 * _ENTRY_PANEL * columns, 8.0 * inputs * columns)


class Costs:
    """Time and memory of a solve: the method's own, which it overrides, and what all share."""

    settings: SolverSettings
    # True: keeps the weights with the best scores, without changing their values.
    by_score: ClassVar[bool] = False
    # True: forms the C x C Hessian even where the statistics are inputs.
    writes_hessian: ClassVar[bool] = False
    # The most (R, C) fp32 matrices that a solve holds at once, besides C x C matrices.
    rows_held: ClassVar[int] = 9

    def method_cost(self, columns: int, device: str) -> MethodCost:
        """The part of `cost` that is due to the method: no refinement, no objectives."""
        return MethodCost()

    def together(self, columns: int, nodes: int) -> float:
        """What each worker has to do besides its share where several compute `fixed` together.

        In operations, as `cost`. nodes: of all workers, each with a GPU. Infinite for a method that
        cannot: then each worker does all of it.
        """
        return math.inf

    def method_counts(self, rows: int, columns: int, device: str) -> SolveCounts:
        """The method's counts for (R, C) with a Hessian; `device`: a torch device type."""
        return SolveCounts(moved=60.0 * rows * columns, operators=40)

    def matrix_bytes(self, columns: float) -> float:
        """Bytes of what the method computes from a Hessian (C, C)."""
        return 0.0

    def cost(self, columns: int, device: str) -> SolveCost:
        """The cost of layers with `columns` inputs; `device`: a torch device type.

        Deterministic: all workers must agree on it.
        """
        method, refined = self.method_cost(columns, device), self.settings.refine != "none"
        # Refinement: one product per step and one to start. Objectives: at zero, before, after.
        products = (self.settings.refine_steps or 0) + 1.0 if refined else 0.0
        products += method.products + (1 if self.by_score and not refined else 3)
        per_row = products * 2.0 * columns**2 + method.per_row
        return SolveCost(method.fixed, per_row, products)

    def counts_of_inputs(self, whole: SolveCounts, columns: int, inputs: float) -> SolveCounts:
        """The counts with n inputs in place of the Hessian, from `whole`, those with a Hessian.

        H is then used as inputs^T inputs, and its inverse through Woodbury's identity.
        """
        other = whole.other
        if self.settings.shrinkage == ESTIMATE or self.writes_hessian:
            other += 2.0 * inputs * columns**2  # all entries of H are computed once
        return replace(
            whole,
            products=2 * inputs / columns * whole.products,
            rounded=2 * inputs / columns * whole.rounded,
            # One product with (C, n) each.
            wide=whole.wide * (inputs / columns) / objective_share(columns),
            other=other,
            inverse=0.0,
        )

    def matrix_bytes_of_inputs(self, rows: int, columns: float, inputs: float) -> float:
        """Bytes of what the method computes from n inputs (n, C); `rows` are padded rows."""
        return 4.0 * inputs * rows + entry_bytes(columns, inputs)
