"""Groups of layers solved on one rank: rows dealt, settings chosen, rows solved and stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pipeline.config.pattern import Pattern
from pipeline.config.solver import ESTIMATE, SolverSettings
from pipeline.models.forward_capture import LayerGroup
from pipeline.runtime.split import GroupRows, row_ranges, whole_layers
from pipeline.solvers.hessian import diagonal_of
from pipeline.solvers.mask_counts import mask_counts
from pipeline.solvers.objective import objective, total_of_rows
from pipeline.solvers.registry import solve_cost, solver_for
from pipeline.solvers.types import Solution, Statistics, percentage
from pipeline.worker.few_tokens import fallback

# All experts of a block may share their input; the layers of a dense block have fewer rows.
MOST_ROWS = 16

FEW_TO_CHOOSE = {
    "shrinkage": ESTIMATE,
    "note": "shrinkage estimate instead of auto: a half of the calibration has too few tokens",
}
"""The choice for an expert that saw too few tokens to compare two halves of them."""


def split_groups(
    groups: Sequence[LayerGroup], settings: Mapping[str, SolverSettings]
) -> tuple[LayerGroup, ...]:
    """Groups whose layers have the same `settings`, by layer: a group is parted where they differ.

    In the order of each part's first layer.
    """
    return tuple(
        LayerGroup(names, group.columns, group.calls)
        for group in groups
        for names in parted([group.layers], settings)
    )


def parted(
    groups: Iterable[tuple[str, ...]], settings: Mapping[str, SolverSettings]
) -> list[tuple[str, ...]]:
    """Groups of layers' names, each parted by the layers' settings."""
    found: list[tuple[str, ...]] = []
    for names in groups:
        parts: dict[SolverSettings, list[str]] = {}
        for layer in names:
            parts.setdefault(settings[layer], []).append(layer)
        found += map(tuple, parts.values())
    return found


def deal_rows(
    settings: Mapping[str, SolverSettings],
    groups: Sequence[LayerGroup],
    shapes: Mapping[str, tuple[int, int]],
    world: int,
) -> list[dict[str, tuple[int, int]]]:
    """The rows of each layer that each of `world` ranks solves: the same answer on every rank.

    `settings` and `shapes`, (rows, C): of each layer of `groups`. A group's layers have the same
    settings. What compares the rows of a layer is dealt by whole layers, apart from the rest.
    """
    separable: list[GroupRows] = []
    whole: list[GroupRows] = []
    for group in groups:
        own = settings[group.name]
        cost = solve_cost(own, group.columns)
        rows = {name: shapes[name][0] for name in group.layers}
        part = GroupRows(rows, cost.fixed, cost.per_row)
        (separable if solver_for(own).separable else whole).append(part)
    pieces: list[dict[str, tuple[int, int]]] = [{} for _ in range(world)]
    for parts, deal in ((separable, row_ranges), (whole, whole_layers)):
        if parts:
            pieces = [one | other for one, other in zip(pieces, deal(parts, world), strict=True)]
    return pieces


def solve_group(
    weights: Mapping[str, Tensor],
    statistics: Statistics | None,
    settings: SolverSettings,
    choice: Mapping[str, Any] | None,
    least_tokens: int = 0,
) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Solves row slices (rows, C) of layers that share an input.

    `choice` overrides settings of this group alone (what `choose_regularization` found).
    `least_tokens`: with fewer, another method is used (see `pipeline.worker.few_tokens`). Returns
    per layer the rows in the dtype of its weight, on the CPU, and the report of exactly those rows,
    with `mask_counts` of them under `mask`.
    """
    tokens = statistics.tokens if statistics is not None else 0
    notes: tuple[str, ...] = ()
    if choice is not None:
        fields = {field.name for field in dataclasses.fields(settings)}
        settings = dataclasses.replace(settings, **{k: choice[k] for k in choice if k in fields})
        notes += (choice["note"],) if "note" in choice else ()
    if statistics is not None and (other := fallback(settings, statistics, least_tokens)):
        settings, statistics, notes = other.settings, other.statistics, (other.note,)
    solver = solver_for(settings)
    solved: dict[str, Solution] = {}
    for part in in_parts(weights):
        solved |= solver.solve_group(part, solver.prepare(statistics))
    return {
        layer: _as_stored(
            _said(solution, tokens, notes), weights[layer], statistics, settings.parsed_pattern
        )
        for layer, solution in solved.items()
    }


def in_parts(weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Row slices (rows, C) in parts of at most MOST_ROWS times C rows, or of one slice.

    What is derived of the statistics is derived again for each part; rows take memory all at once.
    """
    parts: list[dict[str, Tensor]] = []
    rows = 0
    for layer, weight in weights.items():
        if not parts or rows + len(weight) > MOST_ROWS * weight.shape[1]:
            parts.append({})
            rows = 0
        parts[-1][layer] = weight
        rows += len(weight)
    return parts


def _said(solution: Solution, tokens: int, notes: tuple[str, ...]) -> Solution:
    """The solution, its report with what only the caller knows."""
    deviations = (*notes, *solution.report.deviations)
    report = dataclasses.replace(solution.report, tokens=tokens, deviations=deviations)
    return dataclasses.replace(solution, report=report)


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
    moments = None if statistics is None else diagonal_of(statistics)
    mask = mask_counts(stored, weight, pattern, moments)
    return stored.cpu(), {**report.to_json(), "mask": mask}
