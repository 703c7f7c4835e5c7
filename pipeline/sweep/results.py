"""The results of a sweep, as a table and as lines to plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pipeline.reporting.run_summary import RunSummary
from pipeline.reporting.tables import Table
from pipeline.sweep.grid import Point
from pipeline.sweep.plots import Line, Panel


def with_dense(table: Table, dense: dict[str, Any]) -> Table:
    """The table with a first row for the dense model, which has only a perplexity.

    dense: its evaluation, by names of columns.
    """
    columns = tuple(
        replace(
            column,
            values=(
                dense.get(column.name) if column.name == "perplexity" else None,
                *column.values,
            ),
        )
        for column in table.columns
    )
    return Table(("dense", *table.rows), columns, table.notes)


def panels(
    points: Sequence[Point], summaries: dict[str, RunSummary], dense: dict[str, Any]
) -> list[Panel]:
    """The plots: perplexity, divergence from the dense model, and error of the layers.

    summaries: by name of a point, for the runs that are done. Errors on another statistic than the
    full second moments are not comparable, and are left out. So are plots without any value.
    """

    def lines(quantity: Callable[[RunSummary], float | None]) -> tuple[Line, ...]:
        made = []
        for name in dict.fromkeys(point.line for point in points):
            members = [point for point in points if point.line == name]
            runs = [summaries.get(point.name) for point in members]
            ys = [None if run is None else quantity(run) for run in runs]
            made.append(Line(name, tuple(point.x for point in members), tuple(ys)))
        return tuple(made)

    def evaluation(run: RunSummary) -> dict[str, Any]:
        return run.evaluation or {}

    def error(run: RunSummary) -> float | None:
        return run.whole.relative_error if run.statistic == "full" else None

    drawn = [
        Panel(
            "perplexity", lines(lambda r: evaluation(r).get("perplexity")), dense.get("perplexity")
        ),
        Panel(
            "Jensen-Shannon divergence, nats",
            lines(lambda r: (evaluation(r).get("against_dense") or {}).get("jensen_shannon")),
        ),
        Panel("relative error of all layers, %", lines(error)),
    ]
    return [p for p in drawn if any(y is not None for line in p.lines for y in line.ys)]
