"""What a sweep found, as a table and as lines to plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pipeline.reporting.run_summary import RunSummary
from pipeline.reporting.tables import Table
from pipeline.sweep.grid import Point
from pipeline.sweep.plots import Line, Panel


def with_dense(table: Table, dense: dict[str, Any]) -> Table:
    """The table with a first row for the dense model, of which the perplexity alone is known."""
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
    points: Sequence[Point], figures: dict[str, RunSummary], dense: dict[str, Any]
) -> list[Panel]:
    """What is plotted: perplexity, divergence from the dense model, and error of the layers.

    Errors on other statistics than the full second moment do not compare, and are left out.
    """

    def lines(of: Callable[[RunSummary], float | None]) -> tuple[Line, ...]:
        made = []
        for name in dict.fromkeys(point.line for point in points):
            own = [point for point in points if point.line == name]
            ys = [of(figures[point.name]) if point.name in figures else None for point in own]
            made.append(Line(name, tuple(point.x for point in own), tuple(ys)))
        return tuple(made)

    def evaluation(run: RunSummary) -> dict[str, Any]:
        return run.evaluation or {}

    def error(run: RunSummary) -> float | None:
        return run.whole.relative_error if run.statistic == "full" else None

    found = [
        Panel(
            "perplexity", lines(lambda r: evaluation(r).get("perplexity")), dense.get("perplexity")
        ),
        Panel(
            "Jensen-Shannon divergence, nats",
            lines(lambda r: (evaluation(r).get("against_dense") or {}).get("jensen_shannon")),
        ),
        Panel("relative error of all layers, %", lines(error)),
    ]
    return [p for p in found if any(y is not None for line in p.lines for y in line.ys)]
