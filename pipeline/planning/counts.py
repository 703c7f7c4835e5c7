"""Operations and bytes of a solve and of its statistics, counted from shapes.

The counts follow the code of `pipeline/solvers` and `pipeline/statistics/accumulate.py`.
R: rows of a worker, C: columns of a group.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.config.solver import SolverSettings
from pipeline.runtime.split import ROW_TILE
from pipeline.solvers.cost import SolveCounts
from pipeline.solvers.mask_counts import rows_at_once
from pipeline.solvers.registry import solver_for
from pipeline.statistics.accumulate import panels, statistics_bytes

_POWER_STEPS = 64
_OBJECTIVE_ROWS = 2048
# Operators of a joint method on a group for any number of rows: scales, first right-hand sides,
# masks, checks. Counted for prox_admm (benchmarks/gpu_counts.py).
_JOINT_OPERATORS = 300
# Operators to count a chunk of a mask.
MASK_OPERATORS = 50
# Bytes that a sum over workers exchanges at once (`pipeline/statistics/all_reduce.py`).
REDUCED_AT_ONCE = 1 << 28


def hessian_flops(tokens: float, columns: int) -> float:
    """Operations to sum x xᵀ over `tokens` inputs: panels of the upper triangle of (C, C)."""
    return sum(2.0 * tokens * stop * (stop - start) for start, stop in panels(columns))


def padded(rows: int) -> int:
    """`rows` rounded up to whole tiles, as a solver pads them."""
    return -(-rows // ROW_TILE) * ROW_TILE


def solve_counts(
    settings: SolverSettings,
    rows: int,
    columns: int,
    itemsize: int,
    device: str,
    inputs: float | None = None,
) -> SolveCounts:
    """The work of solving `rows` rows of a group.

    settings: need not be resolved. itemsize: bytes of a stored weight. device: a torch device
    type. inputs: their number, where they are used in place of the Hessian.
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
    # Rows are stacked, stored, and their masks counted; joint methods scale them, both ways.
    entries = float(rows) * columns
    wide, moved = 0, counts.moved + (290.0 if solver.joint else 190.0) * entries
    if refine:
        products += refine + 1
        steps += refine + 1
        operators += 20 * (refine + 2)
        moved += (150.0 + 17.0 * (refine + 1)) * entries  # scaled twice, and back
        if settings.refine == "gradient":
            moved += 4.0 * columns * columns * _POWER_STEPS
    operators += _JOINT_OPERATORS if solver.joint else 0
    # Objectives: at zero, before and after refinement, and of the weight rounded to its dtype.
    evaluations = 2 + bool(refine) + (itemsize != 4)
    if full:
        wide = evaluations
        chunks = -(-rows // _OBJECTIVE_ROWS)
        moved += evaluations * (6.0 * columns * columns * chunks + 80.0 * entries)
        operators += evaluations * 6 * chunks * -(-columns // 256)
        moved += 60.0 * columns * columns  # checks, and the estimate of shrinkage
        operators += 12 * -(-columns // 256)
    else:
        moved += evaluations * 40.0 * entries
        operators += evaluations * 8
    # The counts of masks (`solvers/mask_counts.py`), in chunks of rows.
    operators += MASK_OPERATORS * -(-rows // rows_at_once(columns, device))
    return replace(
        counts, products=products, wide=wide, steps=steps, moved=moved, operators=operators
    )


def statistic_bytes(settings: SolverSettings, columns: int, halves: int = 1) -> int:
    """Bytes of the statistics of a group on one worker; halves: 2 with one for each half."""
    needs = solver_for(settings).needs
    if needs == "none":
        return 0
    return halves * 4 * (columns * columns + 2 * columns if needs == "full" else columns)


def summed_bytes(settings: SolverSettings, columns: int, halves: int = 1) -> int:
    """Bytes of the running sums of a group on one worker; halves: 2 with one for each half."""
    needs = solver_for(settings).needs
    return 0 if needs == "none" else halves * statistics_bytes(columns, needs)


def reduced_bytes(size: float, world: int) -> float:
    """Bytes that one worker sends, and receives, to sum `size` bytes over `world` workers.

    It sends one slice to each other worker, and then the sum of its slice to each of them.
    """
    return 2.0 * (world - 1) / world * size


def reduce_operators(size: float, columns: int, world: int, full: bool) -> float:
    """Operators to sum the `size` bytes of a group over workers, and to make statistics of them.

    full: whether there is a matrix, in panels.
    """
    exchanged = -(-size // REDUCED_AT_ONCE) * (world + 3) if world > 1 else 0.0
    return exchanged + (2 * len(panels(columns)) + 2 if full else 1)


def reduce_moved(size: float, world: int) -> float:
    """Bytes read and written on the device to sum `size` bytes of float64 over workers.

    A copy to be sent, the slices added, a copy back; then the fp32 matrix, and its lower half.
    """
    exchanged = 5.0 + 2.0 / world + 3.0 * (world - 1) / world if world > 1 else 0.0
    return (exchanged + 2.3) * size


def observing_operators(columns: int, batches: int, products: bool) -> float:
    """Operators to add the inputs of `batches` batches to a group's sums, and to check these.

    products: whether products are summed, in panels.
    """
    each, checks = (1 + 2 * len(panels(columns)), 12) if products else (4, 8)
    return batches * each + checks


def store_bytes(nsamples: int, seqlen: int, hidden: int, itemsize: int) -> int:
    """Bytes of one activation store: the inputs of one block."""
    return nsamples * seqlen * hidden * itemsize
