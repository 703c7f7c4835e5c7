"""What all methods share: checks, stacking the rows of a group, refinement, reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.config.pattern import Pattern
from pipeline.config.solver import ESTIMATE, SolverSettings
from pipeline.solvers.cost import (
    MethodCost,
    SolveCost,
    SolveCounts,
    entry_bytes,
    objective_share,
)
from pipeline.solvers.hessian import (
    ScaledHessian,
    check_statistics,
    regularization_of,
    scaled_hessian,
)
from pipeline.solvers.masks import keep_mask
from pipeline.solvers.objective import objective, statistic_name, total_of_rows
from pipeline.solvers.refine import Refined, refine
from pipeline.solvers.types import Solution, SolveReport, Statistics, percentage
from storage.errors import NumericalError

_ROW_TILE = 16


@dataclass(frozen=True)
class GroupData:
    """What a method derived from the statistics of a group of layers with the same input.

    problem: the regularized Hessian, where the method or its refinement needs one. matrix: a
    (C, C) fp32 that belongs to the method. eigenvalue: the largest of H~, for ``prox``.
    """

    statistics: Statistics | None
    problem: ScaledHessian | None = None
    matrix: Tensor | None = None
    eigenvalue: float = 0.0
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """A method's result before refinement: weight (R, C) fp32, the mask (R, C) bool of what may be
    non-zero, iterations run, and the share of every row's support the last step changed, (R,).

    problem: the problem that was solved, if not the prepared one (its damping was raised).
    """

    weight: Tensor
    mask: Tensor
    iterations: int
    support_change: Tensor
    blocksize: int | None = None
    problem: ScaledHessian | None = None


class BaseSolver(ABC):
    """One method with its settings.

    A subclass gives ``statistic``, ``_find`` and, where it computes something per group,
    ``_derive``; and what its solve takes: ``method_cost``, ``method_counts``, ``matrix_bytes``,
    ``rows_held``.
    """

    # What the choice itself needs of the inputs: "none", "diagonal" or "full".
    statistic: ClassVar[str] = "full"
    # Chooses by a score of each weight, and leaves the kept ones as they are.
    by_score: ClassVar[bool] = False
    # Looks for the mask and the weights together.
    joint: ClassVar[bool] = False
    # Compiles kernels in a CPU worker.
    compiles: ClassVar[bool] = False
    # Writes the Hessian down where it is given as inputs.
    writes_hessian: ClassVar[bool] = False
    # Matrices of the rows' size, fp32, that it holds at most, besides C x C.
    rows_held: ClassVar[int] = 9
    # The fields of `SolverSettings` that this method alone reads.
    own_settings: ClassVar[tuple[str, ...]] = ()
    # What to try where the last step still changed much of the mask; None: not a sign of anything.
    unsettled_advice: ClassVar[str | None] = None

    def __init__(self, settings: SolverSettings) -> None:
        self.settings = settings.resolved()
        self.pattern: Pattern = self.settings.parsed_pattern

    @property
    def needs(self) -> str:
        """ "none", "diagonal" or "full"; an explicit refinement makes it "full"."""
        return self.statistic if self.settings.refine == "none" else "full"

    @property
    def separable(self) -> bool:
        """Whether a row slice solves to the same as those rows in the whole layer."""
        return True

    def prepare(self, statistics: Statistics | None) -> GroupData:
        """Everything that belongs to the group. Raises NumericalError, ConfigError."""
        if statistics is None:
            if self.needs != "none":
                raise NumericalError(f"{self.settings.method} needs {self.needs} statistics")
            return GroupData(None)
        self.pattern.check_columns(statistics.columns)
        if self.needs == "full":
            damping, shrinkage = regularization_of(self.settings, statistics)
            problem = scaled_hessian(statistics, damping=damping, shrinkage=shrinkage)
            return self._derive(GroupData(statistics, problem))
        check_statistics(statistics)
        return self._derive(GroupData(statistics))

    def solve(self, weight: Tensor, prepared: GroupData) -> Solution:
        """Prune one layer or row slice: (R, C) of any float dtype, left as it is."""
        return self.solve_group({"": weight}, prepared)[""]

    def weights(self, weight: Tensor, prepared: GroupData) -> Tensor:
        """(R, C) fp32: what the method itself finds, without refinement and report."""
        return self._find(self._stack({"": weight}), prepared).weight[: len(weight)]

    def solve_group(
        self, weights: Mapping[str, Tensor], prepared: GroupData
    ) -> dict[str, Solution]:
        """Prune layers, or row slices of layers, that share the input of ``prepared``.

        weights: name -> (R_i, C) of any float dtype on the statistics' device; R_i may be 0.
        Rows are stacked, so that factorizations and products serve all layers at once.
        Raises NumericalError naming the layer for NaN or Inf in a weight, before any work.
        """
        for name, weight in weights.items():
            self._check_weight(name, weight, prepared)
        if not self.separable and len(weights) > 1:
            return {
                name: self.solve_group({name: weight}, prepared)[name]
                for name, weight in weights.items()
            }
        if not weights:
            return {}
        original = self._stack(weights)
        found = self._find(original, prepared)
        problem = found.problem or prepared.problem
        refined = self._refine(found, original, problem, prepared)
        zero = objective(torch.zeros_like(original), original, prepared.statistics)
        solutions: dict[str, Solution] = {}
        start = 0
        for name, weight in weights.items():
            rows = slice(start, start + weight.shape[0])
            report = self._report(found, refined, zero, rows, problem, prepared)
            # Adding zero turns -0 into 0: pruned entries have one bit pattern.
            solutions[name] = Solution(refined.weight[rows] + 0.0, report)
            start = rows.stop
        return solutions

    def _stack(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The rows of all layers, (R, C) fp32, and zero rows up to a multiple of 16.

        A CPU product takes other paths for a handful of rows or an odd rest, and rounds there in
        another order; with whole tiles a slice gives the same bytes as the layer. Zero rows are
        left out where rows are compared with each other.
        """
        parts = [weight.detach().float() for weight in weights.values()]
        missing = -sum(len(part) for part in parts) % _ROW_TILE
        if missing and self.separable:
            parts.append(parts[0].new_zeros(missing, parts[0].shape[1]))
        return torch.cat(parts)

    @abstractmethod
    def _find(self, original: Tensor, prepared: GroupData) -> Found:
        """Choose mask and weights for (R, C) fp32, which must not be changed."""

    def _derive(self, prepared: GroupData) -> GroupData:
        """Add what the method itself computes once per group."""
        return prepared

    # -- what a solve takes -----------------------------------------------------------------

    def method_cost(self, columns: int) -> MethodCost:
        """The method's own part of `cost`."""
        return MethodCost()

    def method_counts(self, rows: int, columns: int, device: str) -> SolveCounts:
        """The method's own counts for (rows, columns) on a torch device type, with a Hessian."""
        return SolveCounts(moved=60.0 * rows * columns, operators=40)

    def matrix_bytes(self, columns: float) -> float:
        """Bytes of what the method derives of a Hessian (C, C)."""
        return 0.0

    def cost(self, columns: int) -> SolveCost:
        """For layers with ``columns`` inputs. Deterministic: every worker must agree on it."""
        own, refined = self.method_cost(columns), self.settings.refine != "none"
        # Refinement: one product a step, one for its start. Objectives: at zero, before, after.
        products = (self.settings.refine_steps or 0) + 1 if refined else 0
        products += own.products + (1 if self.by_score and not refined else 3)
        per_row = products * 2.0 * columns**2 + own.per_row
        return SolveCost(own.fixed, per_row, products)

    def counts_of_inputs(self, whole: SolveCounts, columns: int, inputs: float) -> SolveCounts:
        """``whole``, the counts with a Hessian, if it is solved from n inputs (Woodbury)."""
        other = whole.other
        if self.settings.shrinkage == ESTIMATE or self.writes_hessian:
            other += 2.0 * inputs * columns**2  # all entries of H are made once
        return replace(
            whole,
            products=2 * inputs / columns * whole.products,
            # One product with (C, n).
            wide=whole.wide * (inputs / columns) / objective_share(columns),
            other=other,
            inverse=0.0,
        )

    def matrix_bytes_of_inputs(self, rows: int, columns: float, inputs: float) -> float:
        """Bytes of what the method derives of n inputs (n, C), for padded rows."""
        return 4.0 * inputs * rows + entry_bytes(columns, inputs)

    def _check_weight(self, name: str, weight: Tensor, prepared: GroupData) -> None:
        label = f"layer {name}: " if name else ""
        if weight.ndim != 2:
            raise NumericalError(f"{label}a weight must have 2 dimensions, not {weight.ndim}")
        self.pattern.check_columns(weight.shape[1])
        statistics = prepared.statistics
        if statistics is not None and weight.shape[1] != statistics.columns:
            raise NumericalError(
                f"{label}the weight has {weight.shape[1]} columns, its statistics have "
                f"{statistics.columns}"
            )
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError(f"{label}the weight holds NaN or Inf")

    def _refine(
        self, found: Found, original: Tensor, problem: ScaledHessian | None, prepared: GroupData
    ) -> Refined:
        kind, steps = self.settings.refine, self.settings.refine_steps or 0
        if problem is None or kind == "none":
            value = objective(found.weight, original, prepared.statistics)
            untouched = torch.zeros(len(value), dtype=torch.bool, device=value.device)
            return Refined(found.weight, value, value, untouched)
        return refine(found.weight, original, problem, kind, steps, found.mask)

    def _report(
        self,
        found: Found,
        refined: Refined,
        zero: Tensor,
        rows: slice,
        problem: ScaledHessian | None,
        prepared: GroupData,
    ) -> SolveReport:
        settings = self.settings
        count = rows.stop - rows.start
        facts: dict[str, Any] = {
            "objective_zero": total_of_rows(zero[rows]),
            "objective_before": total_of_rows(refined.before[rows]),
            "objective": total_of_rows(refined.after[rows]),
        }
        notes = prepared.deviations + (problem.deviations if problem else ())
        return SolveReport(
            method=settings.method,
            pattern=str(self.pattern),
            rows=count,
            **facts,
            relative_error=percentage(facts["objective"], facts["objective_zero"]),
            statistic=statistic_name(prepared.statistics),
            tokens=prepared.statistics.tokens if prepared.statistics else 0,
            iterations=found.iterations,
            support_change=float(found.support_change[rows].sum()) / max(count, 1),
            refine=settings.refine,
            refine_steps=settings.refine_steps or 0,
            rows_kept_unrefined=int(refined.kept[rows].sum()),
            damping=problem.damping if problem else 0.0,
            shrinkage=problem.shrinkage if problem else 0.0,
            blocksize=found.blocksize,
            deviations=notes,
        )


def solve_diagonal(original: Tensor, problem: ScaledHessian, pattern: Pattern) -> Found:
    """The exact solution where full shrinkage has made H diagonal: Wanda's choice, weights as
    they are on the live columns."""
    rows, _ = problem.enter(original)
    mask = keep_mask(pattern, rows.abs())
    still = torch.zeros(len(original), device=original.device)
    return Found(original * (mask & problem.live), mask, 1, still)


def support_change(before: Tensor, after: Tensor, kept: Tensor) -> Tensor:
    """Share of each row's support that changed: (R, C) bool twice, and the final mask -> (R,).

    An entry that leaves and one that enters are one change.
    """
    changed = (before ^ after).sum(dim=1).float() / 2
    return changed / kept.sum(dim=1).clamp(min=1)
