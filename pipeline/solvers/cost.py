"""What a solve takes, from shapes and settings alone: for dealing rows to workers and for plans.

R: rows of a rank, C: columns of a group, n: inputs that stand for a Hessian. A solver gives these
for its own method (`base.BaseSolver`); here is how they are stated.
"""

from __future__ import annotations

from dataclasses import dataclass

# Time of the elementwise work of an iteration on one entry, in operations at the speed of a
# product, and of one inverse above the 2 C^3 operations that it needs: measured on a CPU
# (benchmarks/scaling.py). A GPU's are of another size, but are small beside products there.
OPERATIONS_PER_ENTRY = 500.0
INVERSE_SLOWDOWN = 1.2
INVERSE_PANEL = 512
"""Columns that a blocked inverse takes at a time."""
_ENTRY_PANEL = 256


@dataclass(frozen=True)
class SolveCost:
    """Operations, at the speed of a matrix product, of solving one group of layers on one worker.

    fixed: paid by each worker that solves any of the group's rows (factorizations). per_row: for
    each row. products: how many products (R, C) x (C, C) are among them.
    """

    fixed: float
    per_row: float
    products: int

    def of(self, rows: int) -> float:
        """Operations for `rows` rows; 0 for none."""
        return self.fixed + rows * self.per_row if rows else 0.0


@dataclass(frozen=True)
class MethodCost:
    """A method's own part of a `SolveCost`, without refinement and objectives.

    products: products (R, C) x (C, C). fixed: operations that each worker pays. per_row: of each
    row, beside the products.
    """

    products: int = 0
    fixed: float = 0.0
    per_row: float = 0.0


@dataclass(frozen=True)
class SolveCounts:
    """One group's solve on one rank.

    products: number of fp32 products (R, C) x (C, C), wide: of objectives, each
    `objective_share` of a product in float64; no whole numbers where n inputs stand for the matrix,
    and a product is two with (C, n). other: further
    fp32 operations of products on rows. inverse: operations of fp32 inverses, factor: of the
    float64 factor, both the same on every rank. steps: iterations that touch all of the rows.
    moved: bytes of passes over C x C and over rows outside the iterations. operators: kernels
    started.
    """

    products: float = 0
    wide: float = 0
    other: float = 0.0
    inverse: float = 0.0
    factor: float = 0.0
    steps: int = 0
    moved: float = 0.0
    operators: int = 0


def objective_share(columns: int) -> float:
    """The share of a product (R, C) x (C, C) that an objective takes: panels of H above its
    diagonal blocks count twice instead of being multiplied twice."""
    count = -(-columns // 256)
    return (count + 1) / (2 * count)


def entry_bytes(columns: float, inputs: float) -> float:
    """Bytes held while entries of H, made of n inputs, are looked at in panels, or objectives are
    taken in float64."""
    return max(12.0 * _ENTRY_PANEL * columns, 8.0 * inputs * columns)
