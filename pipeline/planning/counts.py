"""What a solve and its statistics compute, in operations and bytes: pure counts of shapes.

They follow the code of `pipeline/solvers` and `pipeline/statistics.py`, whose settings they read.
R: rows of a rank, C: columns of a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pipeline.solvers import METHODS, SolverSettings, auto_blocksize, solver_for
from pipeline.solvers.types import ESTIMATE
from pipeline.statistics import panels, statistics_bytes

_ROW_TILE = 16
# The share of its schedule after which every row of `prox` is two of four, as seen in real layers.
_PROX_SHARE = 0.45
_PROX_END = 1e4
_POWER_STEPS = 64
_OBJECTIVE_ROWS = 2048


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


def hessian_flops(tokens: float, columns: int) -> float:
    """Operations to sum x xᵀ of `tokens` inputs: the upper triangle of panels, both halves of a
    panel's own square."""
    return sum(2.0 * tokens * stop * (stop - start) for start, stop in panels(columns))


def objective_share(columns: int) -> float:
    """The share of a product (R, C) x (C, C) that an objective takes: panels of H above its
    diagonal blocks count twice instead of being multiplied twice."""
    count = -(-columns // 256)
    return (count + 1) / (2 * count)


def padded(rows: int) -> int:
    """Rows as the solver stacks them: whole tiles."""
    return -(-rows // _ROW_TILE) * _ROW_TILE


def solve_counts(
    settings: SolverSettings,
    rows: int,
    columns: int,
    itemsize: int,
    device: str,
    inputs: float | None = None,
) -> SolveCounts:
    """One group's solve of `rows` rows, `itemsize` bytes an element stored, on `device` (a torch
    device type). inputs: how many of them stand for the Hessian, if so. Settings are resolved here.
    """
    settings = settings.resolved()
    if not rows:
        return SolveCounts()
    if inputs is not None and solver_for(settings).needs == "full":
        whole = solve_counts(settings, rows, columns, itemsize, device)
        return _of_inputs(whole, settings, rows, columns, inputs)
    counts = _BY_METHOD[settings.method](settings, rows, columns, device)
    full = solver_for(settings).needs == "full"
    refine = settings.refine_steps or 0 if settings.refine != "none" else 0
    products, steps, operators = counts.products, counts.steps, counts.operators
    wide, moved = 0, counts.moved + 40.0 * rows * columns
    if refine:
        products += refine + 1
        steps += refine + 1
        operators += 20 * (refine + 2)
        if settings.refine == "gradient":
            moved += 4.0 * columns * columns * _POWER_STEPS
    # Objectives: of zero, before and after refinement, and of what was rounded to be stored.
    evaluations = 2 + bool(refine) + (itemsize != 4)
    if full:
        wide = evaluations
        chunks = -(-rows // _OBJECTIVE_ROWS)
        moved += evaluations * (6.0 * columns * columns * chunks + 40.0 * rows * columns)
        operators += evaluations * 6 * chunks * -(-columns // 256)
        moved += 60.0 * columns * columns  # checks, the estimate of the noise
        operators += 12 * -(-columns // 256)
    else:
        moved += evaluations * 40.0 * rows * columns
        operators += evaluations * 8
    return SolveCounts(
        products=products,
        wide=wide,
        other=counts.other,
        inverse=counts.inverse,
        factor=counts.factor,
        steps=steps,
        moved=moved,
        operators=operators,
    )


def _of_inputs(
    whole: SolveCounts, settings: SolverSettings, rows: int, columns: int, inputs: float
) -> SolveCounts:
    """The counts of a solve with a Hessian, if it is solved from `inputs` inputs (Woodbury)."""
    narrow = 2 * inputs / columns
    other, inverse, moved = whole.other, 0.0, whole.moved
    if settings.shrinkage == ESTIMATE or settings.method == "sparsegpt":
        other += 2.0 * inputs * columns**2  # all entries of H are made once
    if settings.method == "prox_admm":
        inverses = whole.inverse / (2.0 * float(columns) ** 3)
        inverse = inverses * (3.0 * inputs**2 * columns + inputs**3 / 3)
    if settings.method == "prox":
        moved -= 4.0 * _POWER_STEPS * columns**2 * (1 - narrow)
    return replace(
        whole,
        products=narrow * whole.products,
        # One product with (C, n).
        wide=whole.wide * (inputs / columns) / objective_share(columns),
        other=other,
        inverse=inverse,
        moved=moved,
    )


def _prox_admm(settings: SolverSettings, rows: int, columns: int, device: str) -> SolveCounts:
    iterations = settings.admm_iterations
    inverses = 1 if settings.admm_first_iterations >= iterations else 2
    return SolveCounts(
        products=1 + iterations,
        steps=1 + iterations,
        inverse=2.0 * inverses * float(columns) ** 3,
        moved=24.0 * inverses * columns * columns,
        operators=12 * iterations + inverses * 12 * -(-columns // 512),
    )


def _prox(settings: SolverSettings, rows: int, columns: int, device: str) -> SolveCounts:
    limit = math.log(_PROX_END / settings.prox_lambda) / math.log(settings.prox_growth)
    iterations = math.ceil(_PROX_SHARE * limit)
    return SolveCounts(
        products=iterations,
        steps=iterations,
        moved=(24.0 + 4.0 * _POWER_STEPS) * columns * columns,
        operators=12 * iterations,
    )


def _sparsegpt(settings: SolverSettings, rows: int, columns: int, device: str) -> SolveCounts:
    asked = settings.blocksize
    width = asked if isinstance(asked, int) else auto_blocksize(columns, device)
    return SolveCounts(
        # Each block's errors go to all columns on its right: R C^2 operations in all.
        other=float(rows) * columns * columns,
        # Inside a block every column is one rank-one update of what is left of the block.
        moved=8.0 * rows * columns * (width / 2 + 8) + 32.0 * columns * columns,
        factor=float(columns) ** 3,
        operators=10 * columns,
    )


def _by_score(settings: SolverSettings, rows: int, columns: int, device: str) -> SolveCounts:
    return SolveCounts(moved=60.0 * rows * columns, operators=40)


_BY_METHOD = {
    "prox_admm": _prox_admm,
    "prox": _prox,
    "sparsegpt": _sparsegpt,
    "wanda": _by_score,
    "magnitude": _by_score,
}
assert _BY_METHOD.keys() == METHODS.keys()


def statistic_bytes(settings: SolverSettings, columns: int, folds: int = 1) -> int:
    """Bytes of one group's statistics on one rank: one sum, or one for each half (folds 2)."""
    needs = solver_for(settings).needs
    if needs == "none":
        return 0
    return folds * 4 * (columns * columns + 2 * columns if needs == "full" else columns)


def summed_bytes(settings: SolverSettings, columns: int, folds: int = 1) -> int:
    """Bytes of one group's running sums on one rank, of which the statistics are made."""
    needs = solver_for(settings).needs
    return 0 if needs == "none" else folds * statistics_bytes(columns, needs)


def reduced_bytes(size: float, world: int) -> float:
    """Bytes that one rank sends to sum `size` bytes over the ranks: its slices to the others, then
    its sum to the others. As many are received."""
    return 2.0 * (world - 1) / world * size


def store_bytes(nsamples: int, seqlen: int, hidden: int, itemsize: int) -> int:
    """Bytes of values in one activation store: the inputs of one block."""
    return nsamples * seqlen * hidden * itemsize
