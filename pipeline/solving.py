"""Groups of layers solved on one rank: rows dealt, settings chosen, rows solved and stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pipeline.capture import LayerGroup
from pipeline.mask import mask_counts
from pipeline.solvers import Solution, SolverSettings, Statistics, objective, solver_for
from pipeline.solvers.cost import solve_cost
from pipeline.solvers.objective import total_of_rows
from pipeline.solvers.types import Pattern, percentage
from pipeline.split import GroupRows, row_ranges, whole_layers


def deal_rows(
    settings: SolverSettings,
    groups: Sequence[LayerGroup],
    shapes: Mapping[str, tuple[int, int]],
    world: int,
) -> list[dict[str, tuple[int, int]]]:
    """The rows of each layer that each of `world` ranks solves: the same answer on every rank.

    `shapes`: (rows, C) of each layer of `groups`.
    """
    costs = {group: solve_cost(settings, group.columns) for group in groups}
    parts = [
        GroupRows({n: shapes[n][0] for n in group.layers}, cost.fixed, cost.per_row)
        for group, cost in costs.items()
    ]
    dealt = row_ranges if solver_for(settings).separable else whole_layers
    return dealt(parts, world)


def solve_group(
    weights: Mapping[str, Tensor],
    statistics: Statistics | None,
    settings: SolverSettings,
    choice: Mapping[str, Any] | None,
) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Solves row slices (rows, C) of layers that share an input.

    `choice` overrides settings of this group alone (what `choose_regularization` found). Returns
    per layer the rows in the dtype of its weight, on the CPU, and the report of exactly those rows,
    with `mask_counts` of them under `mask`.
    """
    if choice is not None:
        fields = {field.name for field in dataclasses.fields(settings)}
        settings = dataclasses.replace(settings, **{k: choice[k] for k in choice if k in fields})
    solver = solver_for(settings)
    solved = solver.solve_group(weights, solver.prepare(statistics))
    return {
        layer: _as_stored(solution, weights[layer], statistics, settings.parsed_pattern)
        for layer, solution in solved.items()
    }


def _as_stored(
    solution: Solution, weight: Tensor, statistics: Statistics | None, pattern: Pattern
) -> tuple[Tensor, dict[str, Any]]:
    stored = solution.weight.to(weight.dtype)
    report = solution.report
    if stored.dtype != solution.weight.dtype and statistics is not None:
        # Rounding to the stored dtype is part of the error that the user gets.
        lost = total_of_rows(objective(stored, weight, statistics))
        report = dataclasses.replace(
            report, objective=lost, relative_error=percentage(lost, report.objective_zero)
        )
    return stored.cpu(), {**report.to_json(), "mask": mask_counts(stored, weight, pattern)}
