"""How long the solve of one group of layers takes on one worker. R: its rows, C: columns."""

from __future__ import annotations

from pipeline.planning.counts import solve_counts
from pipeline.planning.memory import rows_at_once
from pipeline.planning.parts.phase_parts import (
    BANDWIDTH,
    COMPUTE,
    LATENCY,
    NETWORK,
    PhasePart,
    merge,
)
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.rates import Rates
from pipeline.planning.shapes.model import GroupShape
from pipeline.solvers.cost import objective_share, together_bytes, together_latency

# Operators of a layer's checks, conversion and report, for any number of rows.
_PER_LAYER = 75


def group_parts(job: PlannedJob, group: GroupShape, rows: int, team: int = 1) -> list[PhasePart]:
    """The solve of `rows` rows of a group, with the work that is the same on every worker.

    team: how many workers compute the inverses together.
    """
    rates, columns = job.rates, group.columns
    most = rows_at_once(group)
    if rows > most:
        # Factorizations are computed again for each part of the rows.
        pieces = [most] * (rows // most) + ([rows % most] if rows % most else [])
        return list(merge(part for piece in pieces for part in group_parts(job, group, piece)))
    settings, device = job.solved_with(group), "cuda" if rates.on_gpu else "cpu"
    counts = solve_counts(
        *(settings, rows, columns, job.shape.itemsize, device), inputs=job.inputs(group)
    )
    operators = counts.operators + _PER_LAYER * len(group.layers)
    entries = float(rows) * columns
    one = 2.0 * entries * columns
    square, share = float(columns) * columns, objective_share(columns)
    moved = 4 * (square + 2 * entries)
    wide = 2 * square + 16 * entries
    inverse = "inverse, same on all" if team == 1 else "inverse, divided"
    return [
        _product(rates, "products", counts.products, one, moved, "float32"),
        _product(rates, "products of iterations", counts.rounded, one, moved, "tf32"),
        _product(rates, "objective", counts.wide, share * one, wide, "float64"),
        PhasePart("products", COMPUTE, counts.other / rates.float32),
        PhasePart(inverse, COMPUTE, counts.inverse / rates.inverse / team),
        *(_together(job, columns, counts.inverses) if team > 1 else ()),
        PhasePart("factor, same on all", COMPUTE, counts.factor / rates.factor),
        PhasePart("iterations", BANDWIDTH, counts.steps * entries / rates.iteration),
        PhasePart("passes over H and W", BANDWIDTH, counts.moved / rates.memory),
        PhasePart("operators", LATENCY, operators * rates.operator),
    ]


def _together(job: PlannedJob, columns: int, inverses: int) -> tuple[PhasePart, ...]:
    """What each worker waits for besides its share of inverses that several compute together."""
    rate = job.rates.link if job.nodes == 1 else job.rates.network
    return (
        PhasePart("inverse, sent", NETWORK, inverses * together_bytes(columns) / rate),
        PhasePart("inverse, steps", LATENCY, inverses * together_latency(columns)),
    )


def _product(
    rates: Rates, what: str, count: float, flops: float, moved: float, precision: str
) -> PhasePart:
    """Products, limited by arithmetic or by memory; on a CPU always by arithmetic (caches)."""
    compute = count * flops / rates.product(precision)
    memory = count * moved / rates.memory if rates.on_gpu else 0.0
    return PhasePart(what, BANDWIDTH if memory > compute else COMPUTE, max(compute, memory))
