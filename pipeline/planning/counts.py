"""What a solve and its statistics compute, in operations and bytes: pure counts of shapes.

They follow the code of `pipeline/solvers` and `pipeline/statistics/accumulate.py`, whose settings
they read. R: rows of a rank, C: columns of a group.
"""

from __future__ import annotations

from pipeline.config.solver import SolverSettings
from pipeline.solvers.cost import SolveCounts
from pipeline.solvers.registry import solver_for
from pipeline.statistics.accumulate import panels, statistics_bytes

_ROW_TILE = 16
_POWER_STEPS = 64
_OBJECTIVE_ROWS = 2048


def hessian_flops(tokens: float, columns: int) -> float:
    """Operations to sum x xᵀ of `tokens` inputs: the upper triangle of panels, both halves of a
    panel's own square."""
    return sum(2.0 * tokens * stop * (stop - start) for start, stop in panels(columns))


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
    solver = solver_for(settings)
    settings, full = solver.settings, solver.needs == "full"
    if not rows:
        return SolveCounts()
    if inputs is not None and full:
        whole = solve_counts(settings, rows, columns, itemsize, device)
        return solver.counts_of_inputs(whole, columns, inputs)
    counts = solver.method_counts(rows, columns, device)
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


def statistic_bytes(settings: SolverSettings, columns: int, halves: int = 1) -> int:
    """Bytes of one group's statistics on one rank: one sum, or one for each half (halves 2)."""
    needs = solver_for(settings).needs
    if needs == "none":
        return 0
    return halves * 4 * (columns * columns + 2 * columns if needs == "full" else columns)


def summed_bytes(settings: SolverSettings, columns: int, halves: int = 1) -> int:
    """Bytes of one group's running sums on one rank, of which the statistics are made."""
    needs = solver_for(settings).needs
    return 0 if needs == "none" else halves * statistics_bytes(columns, needs)


def reduced_bytes(size: float, world: int) -> float:
    """Bytes that one rank sends to sum `size` bytes over the ranks: its slices to the others, then
    its sum to the others. As many are received."""
    return 2.0 * (world - 1) / world * size


def store_bytes(nsamples: int, seqlen: int, hidden: int, itemsize: int) -> int:
    """Bytes of values in one activation store: the inputs of one block."""
    return nsamples * seqlen * hidden * itemsize
