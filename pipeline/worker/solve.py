"""Solves groups of layers on one rank: the division of rows, the settings, the solve, the report.

Shapes: R rows (output features), C columns (input features) of a layer's weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pipeline.config.pattern import Pattern
from pipeline.config.solver import ESTIMATE, SolverSettings
from pipeline.models.forward_capture import LayerGroup
from pipeline.runtime.split import GroupRows, ranks_of, row_ranges, whole_layers
from pipeline.solvers.auto_shrinkage import NOT_COMPARED, choose_regularization
from pipeline.solvers.base import naming
from pipeline.solvers.hessian import diagonal_of
from pipeline.solvers.mask_counts import mask_counts
from pipeline.solvers.objective import objective, total_of_rows
from pipeline.solvers.registry import solve_cost, solver_class, solver_for
from pipeline.solvers.stored import as_stored
from pipeline.solvers.types import Solution, SolveReport, Statistics, Team, percentage
from pipeline.statistics.accumulate import HalvedStatistics
from pipeline.worker.few_tokens import fallback

# Rows solved at once, in multiples of C. All experts of a block may share their input; the groups
# of a dense block have fewer rows.
MOST_ROWS = 16

TOO_FEW_TOKENS = {
    "shrinkage": ESTIMATE,
    "note": "shrinkage estimate instead of auto: a half of the calibration has too few tokens",
}
"""The choice for an expert with too few tokens to compare two halves of the calibration."""


def split_groups(
    groups: Sequence[LayerGroup], settings: Mapping[str, SolverSettings]
) -> tuple[LayerGroup, ...]:
    """Splits groups of layers that share an input into groups that also share their settings.

    settings: by layer. The parts of a group are ordered by their first layers.
    """
    return tuple(
        LayerGroup(names, group.columns, group.calls)
        for group in groups
        for names in parted([group.layers], settings)
    )


def parted(
    groups: Iterable[tuple[str, ...]], settings: Mapping[str, SolverSettings]
) -> list[tuple[str, ...]]:
    """Groups, given as layers' names, each split by the layers' settings."""
    split: list[tuple[str, ...]] = []
    for names in groups:
        parts: dict[SolverSettings, list[str]] = {}
        for layer in names:
            parts.setdefault(settings[layer], []).append(layer)
        split += map(tuple, parts.values())
    return split


def deal_rows(
    settings: Mapping[str, SolverSettings],
    groups: Sequence[LayerGroup],
    shapes: Mapping[str, tuple[int, int]],
    world: int,
    device: str,
    nodes: int | None = None,
) -> list[dict[str, tuple[int, int]]]:
    """By rank: layer → (start, stop), the rows that it solves. The same answer on every rank.

    settings, shapes (R, C): by layer. The layers of a group have the same settings. device: the
    torch device type of the ranks. nodes: how many hold the ranks, where these send from GPU to
    GPU; None elsewhere. Rows are divided evenly by cost; for a method that compares a layer's rows,
    whole layers are.
    """
    separable: list[GroupRows] = []
    whole: list[GroupRows] = []
    for group in groups:
        group_settings = settings[group.name]
        part = _group_rows(group_settings, group, shapes, device, nodes)
        (separable if solver_for(group_settings).separable else whole).append(part)
    pieces: list[dict[str, tuple[int, int]]] = [{} for _ in range(world)]
    for parts, deal in ((separable, row_ranges), (whole, whole_layers)):
        if parts:
            pieces = [one | other for one, other in zip(pieces, deal(parts, world), strict=True)]
    return pieces


def teams(
    settings: Mapping[str, SolverSettings],
    groups: Sequence[LayerGroup],
    shapes: Mapping[str, tuple[int, int]],
    dealt: Sequence[Mapping[str, tuple[int, int]]],
    device: str,
    nodes: int | None = None,
) -> dict[str, tuple[int, ...]]:
    """Group, by name → the ranks that compute what its rows share together, where that is cheaper.

    dealt: what `deal_rows` returned; the others are its arguments.
    """
    found: dict[str, tuple[int, ...]] = {}
    for group in groups:
        ranks = ranks_of(group.layers, dealt)
        if len(ranks) > 1:
            part = _group_rows(settings[group.name], group, shapes, device, nodes)
            if part.is_joint(len(ranks)):
                found[group.name] = ranks
    return found


def _group_rows(
    settings: SolverSettings,
    group: LayerGroup,
    shapes: Mapping[str, tuple[int, int]],
    device: str,
    nodes: int | None,
) -> GroupRows:
    """The costs of a group; see `deal_rows`."""
    cost = solve_cost(settings, group.columns, device)
    rows = {name: shapes[name][0] for name in group.layers}
    together = math.inf
    # Ranks whose rows are in more parts than others' (`in_parts`) would call more often.
    if nodes is not None and sum(rows.values()) <= MOST_ROWS * group.columns:
        together = solver_for(settings).together(group.columns, nodes)
    return GroupRows(rows, cost.fixed, cost.per_row, together)


def choose_settings(
    weights: Mapping[str, Tensor], halves: HalvedStatistics, settings: SolverSettings
) -> dict[str, Any]:
    """The settings that --shrinkage auto chooses for layers that share an input, as JSON.

    weights: layer → (R, C), all rows. halves: statistics of the two halves of the calibration.
    Raises `NumericalError`, naming the layers, as a solve does.
    """
    first, second = halves
    with naming(weights):
        choice = choose_regularization(weights, (first, second), settings)
    if choice is None:
        return {"shrinkage": ESTIMATE, "note": NOT_COMPARED}
    return choice.to_json()


def solve_group(
    weights: Mapping[str, Tensor],
    statistics: Statistics | None,
    settings: SolverSettings,
    choice: Mapping[str, Any] | None,
    least_tokens: int = 0,
    team: Team | None = None,
) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Solves row slices of layers that share an input.

    weights: layer → (rows, C). statistics: over all calibration tokens; None for a method that
    needs none. choice: settings of this group that `choose_regularization` chose; None for none.
    least_tokens: with fewer tokens another method is used (see `pipeline.worker.few_tokens`).
    team: the ranks that compute what is the same for all rows together (see `teams`).

    Returns per layer the pruned rows (rows, C), in the weight's dtype on the CPU, and their report
    as JSON, with `mask_counts` under `mask`. Raises `NumericalError`, naming the layer, for NaN or
    Inf, also where a pruned weight is beyond the weight's dtype.
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
        with naming(part):
            prepared = dataclasses.replace(solver.prepare(statistics), team=team)
        solved |= solver.solve_group(part, prepared)
    return {
        layer: _as_stored(
            layer,
            _annotated(solution, tokens, notes),
            weights[layer],
            statistics,
            settings.parsed_pattern,
        )
        for layer, solution in solved.items()
    }


def in_parts(weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Row slices (rows, C) in parts of at most MOST_ROWS · C rows, or of a single slice.

    This bounds memory: all rows of a part are solved at once. What a solver derives from the
    statistics (a factorization) is derived again for each part.
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


def _annotated(solution: Solution, tokens: int, notes: tuple[str, ...]) -> Solution:
    """Adds the number of tokens and the notes to the solution's report."""
    deviations = (*notes, *solution.report.deviations)
    report = dataclasses.replace(solution.report, tokens=tokens, deviations=deviations)
    return dataclasses.replace(solution, report=report)


def _as_stored(
    layer: str,
    solution: Solution,
    weight: Tensor,
    statistics: Statistics | None,
    pattern: Pattern,
) -> tuple[Tensor, dict[str, Any]]:
    """The rows in the weight's dtype, on the CPU, and their report as JSON."""
    with naming([layer]):
        stored, notes = as_stored(solution.weight, weight.dtype, _remedy(layer, solution.report))
    report = solution.report
    report = dataclasses.replace(report, deviations=(*report.deviations, *notes))
    if stored.dtype != solution.weight.dtype and statistics is not None:
        # The reported error includes the rounding to the stored dtype.
        rounded = total_of_rows(objective(stored, weight, statistics))
        report = dataclasses.replace(
            report, objective=rounded, relative_error=percentage(rounded, report.objective_zero)
        )
    moments = None if statistics is None else diagonal_of(statistics)
    mask = mask_counts(stored, weight, pattern, moments)
    return stored.cpu(), {**report.to_json(), "mask": mask}


def _remedy(layer: str, report: SolveReport) -> str:
    """What to do about solved weights that are too large to be stored."""
    if solver_class(report.method).by_score:
        kept = "--refine none, which keeps weights as they are"
    else:
        kept = f"--override '{layer}=wanda', which keeps weights as they are if it is not refined"
    return f"use a larger --damping, or {kept}, or leave it dense (--override '{layer}=dense')"
