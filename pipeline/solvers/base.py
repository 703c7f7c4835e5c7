"""What all methods share: checks, stacking the rows of a group's layers, refinement, reports.

Shapes: R rows (output features), C columns (input features).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.config.pattern import Pattern
from pipeline.config.solver import ESTIMATE, GpuProducts, SolverSettings
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
    dead_inputs,
    regularization_of,
    scaled_hessian,
)
from pipeline.solvers.masks import keep_mask
from pipeline.solvers.objective import objective, statistic_name, total_of_rows
from pipeline.solvers.refine import Refined, refine
from pipeline.solvers.types import Solution, SolveReport, Statistics, percentage
from storage.errors import NumericalError

_ROW_TILE = 16
NO_INPUT = "largest weights kept: its inputs are 0 on all of the calibration text"
"""The deviation of a layer about which the calibration says nothing."""


@dataclass(frozen=True)
class GroupData:
    """What a method computed once from the statistics of a group of layers that share an input.

    problem: the regularized Hessian, where the method or its refinement needs it. matrix: a
    (C, C) fp32 matrix of the method, such as a factor. eigenvalue: the largest one of H~, which
    `prox` needs. dead_inputs, deviations: see `SolveReport`.
    """

    statistics: Statistics | None
    problem: ScaledHessian | None = None
    matrix: Tensor | None = None
    eigenvalue: float = 0.0
    dead_inputs: int = 0
    deviations: tuple[str, ...] = ()

    @property
    def no_input(self) -> bool:
        """Whether H is 0, so that every pruned weight would cost nothing."""
        return self.statistics is not None and self.dead_inputs == self.statistics.columns


@dataclass(frozen=True)
class MethodResult:
    """The result of a method before refinement.

    weight: (R, C) fp32. mask: (R, C) bool, True where a weight may be non-zero. iterations: how
    many were run. support_change: (R,) fp32, share of each row's support that the last step
    changed. blocksize: the lazy block size that was used, if any. problem: the problem that was
    solved, where it is not the prepared one because its damping was raised. products: see
    `SolveReport`.
    """

    weight: Tensor
    mask: Tensor
    iterations: int
    support_change: Tensor
    blocksize: int | None = None
    problem: ScaledHessian | None = None
    products: GpuProducts = "float32"


class BaseSolver(ABC):
    """One method with its settings.

    A subclass defines `statistic` and `_find`, and `_derive` if it computes something once per
    group. It states its cost by `method_cost`, `method_counts`, `matrix_bytes` and `rows_held`.
    """

    # The statistic of the inputs that choosing the mask needs: "none", "diagonal" or "full".
    statistic: ClassVar[str] = "full"
    # True: keeps the weights with the best scores, without changing their values.
    by_score: ClassVar[bool] = False
    # True: optimizes mask and weights together.
    joint: ClassVar[bool] = False
    # True: compiles kernels in a CPU worker.
    compiles: ClassVar[bool] = False
    # True: forms the C x C Hessian even where the statistics are inputs.
    writes_hessian: ClassVar[bool] = False
    # The most (R, C) fp32 matrices that a solve holds at once, besides C x C matrices.
    rows_held: ClassVar[int] = 9
    # The fields of `SolverSettings` that only this method reads.
    method_settings: ClassVar[tuple[str, ...]] = ()
    # Advice where the last step still changed much of the mask; None where that means nothing.
    unsettled_advice: ClassVar[str | None] = None

    def __init__(self, settings: SolverSettings) -> None:
        self.settings = settings.resolved()
        self.pattern: Pattern = self.settings.parsed_pattern

    @property
    def needs(self) -> str:
        """The statistic of a solve: that of the method, or "full" if there is a refinement."""
        return self.statistic if self.settings.refine == "none" else "full"

    @property
    def separable(self) -> bool:
        """Whether a row slice, solved alone, gives the same bytes as in the whole layer."""
        return True

    def prepare(self, statistics: Statistics | None) -> GroupData:
        """What all layers of a group share, computed from its statistics.

        Where all inputs are 0 that is a note: the largest weights will be kept.
        Raises NumericalError for missing or invalid statistics, ConfigError where the pattern does
        not divide C.
        """
        if statistics is None:
            if self.needs != "none":
                raise NumericalError(f"{self.settings.method} needs {self.needs} statistics")
            return GroupData(None)
        self.pattern.check_columns(statistics.columns)
        prepared = GroupData(statistics, dead_inputs=dead_inputs(statistics))
        if prepared.no_input:
            check_statistics(statistics)
            return replace(prepared, deviations=() if self.needs == "none" else (NO_INPUT,))
        if self.needs == "full":
            damping, shrinkage = regularization_of(self.settings, statistics)
            problem = scaled_hessian(statistics, damping=damping, shrinkage=shrinkage)
            return self._derive(replace(prepared, problem=problem))
        check_statistics(statistics)
        return self._derive(prepared)

    def solve(self, weight: Tensor, prepared: GroupData) -> Solution:
        """Prune one layer or row slice: (R, C) of any float dtype, which is not changed."""
        return self.solve_group({"": weight}, prepared)[""]

    def weights(self, weight: Tensor, prepared: GroupData) -> Tensor:
        """The pruned weight (R, C) fp32 of the method, without refinement and report."""
        return self._found(self._stack({"": weight}), prepared).weight[: len(weight)]

    def solve_group(
        self, weights: Mapping[str, Tensor], prepared: GroupData
    ) -> dict[str, Solution]:
        """Prune layers, or row slices of layers, that share the input of `prepared`.

        weights: name -> (R_i, C) of any float dtype, on the device of the statistics; R_i may be 0.
        Their rows are stacked and solved together.
        Raises NumericalError, naming the layer, for a wrong shape or NaN or Inf in a weight, which
        are checked first, and for a Hessian that is not positive definite.
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
        with naming(weights):
            result = self._found(original, prepared)
        problem = result.problem or prepared.problem
        refined = self._refine(result, original, problem, prepared)
        zero = objective(torch.zeros_like(original), original, prepared.statistics)
        solutions: dict[str, Solution] = {}
        start = 0
        for name, weight in weights.items():
            rows = slice(start, start + weight.shape[0])
            report = self._report(result, refined, zero, rows, problem, prepared)
            # -0.0 + 0.0 is 0.0: all pruned entries have the same bits.
            solutions[name] = Solution(refined.weight[rows] + 0.0, report)
            start = rows.stop
        return solutions

    def _stack(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The rows of all layers, (R, C) fp32, padded with zero rows to a multiple of 16.

        CPU matrix products use other code, which rounds in another order, for few rows and for
        remainders of a tile. With whole tiles a row slice gives the same bytes as the whole layer.
        There is no padding where the method compares rows with each other.
        """
        parts = [weight.detach().float() for weight in weights.values()]
        missing = -sum(len(part) for part in parts) % _ROW_TILE
        if missing and self.separable:
            parts.append(parts[0].new_zeros(missing, parts[0].shape[1]))
        return torch.cat(parts)

    def _found(self, original: Tensor, prepared: GroupData) -> MethodResult:
        """What the method finds for `original` (R, C) fp32; its largest weights without inputs."""
        if not prepared.no_input or self.statistic == "none":
            return self._find(original, prepared)
        mask = keep_mask(self.pattern, original.abs())
        no_change = torch.zeros(len(original), device=original.device)
        return MethodResult(original * mask, mask, 0, no_change)

    @abstractmethod
    def _find(self, original: Tensor, prepared: GroupData) -> MethodResult:
        """Choose mask and weights for `original` (R, C) fp32, which must not be changed."""

    def _derive(self, prepared: GroupData) -> GroupData:
        """`prepared` with what the method computes once per group added."""
        return prepared

    # -- time and memory of a solve -------------------------------------------------------------

    def method_cost(self, columns: int, device: str) -> MethodCost:
        """The part of `cost` that is due to the method: no refinement, no objectives."""
        return MethodCost()

    def method_counts(self, rows: int, columns: int, device: str) -> SolveCounts:
        """The method's counts for (R, C) with a Hessian; `device`: a torch device type."""
        return SolveCounts(moved=60.0 * rows * columns, operators=40)

    def matrix_bytes(self, columns: float) -> float:
        """Bytes of what the method computes from a Hessian (C, C)."""
        return 0.0

    def cost(self, columns: int, device: str) -> SolveCost:
        """The cost of layers with `columns` inputs; `device`: a torch device type.

        Deterministic: all workers must agree on it.
        """
        method, refined = self.method_cost(columns, device), self.settings.refine != "none"
        # Refinement: one product per step and one to start. Objectives: at zero, before, after.
        products = (self.settings.refine_steps or 0) + 1.0 if refined else 0.0
        products += method.products + (1 if self.by_score and not refined else 3)
        per_row = products * 2.0 * columns**2 + method.per_row
        return SolveCost(method.fixed, per_row, products)

    def counts_of_inputs(self, whole: SolveCounts, columns: int, inputs: float) -> SolveCounts:
        """The counts with n inputs in place of the Hessian, from `whole`, those with a Hessian.

        H is then used as inputs^T inputs, and its inverse through Woodbury's identity.
        """
        other = whole.other
        if self.settings.shrinkage == ESTIMATE or self.writes_hessian:
            other += 2.0 * inputs * columns**2  # all entries of H are computed once
        return replace(
            whole,
            products=2 * inputs / columns * whole.products,
            rounded=2 * inputs / columns * whole.rounded,
            # One product with (C, n) each.
            wide=whole.wide * (inputs / columns) / objective_share(columns),
            other=other,
            inverse=0.0,
        )

    def matrix_bytes_of_inputs(self, rows: int, columns: float, inputs: float) -> float:
        """Bytes of what the method computes from n inputs (n, C); `rows` are padded rows."""
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
        self,
        result: MethodResult,
        original: Tensor,
        problem: ScaledHessian | None,
        prepared: GroupData,
    ) -> Refined:
        kind, steps = self.settings.refine, self.settings.refine_steps or 0
        if problem is None or kind == "none":
            value = objective(result.weight, original, prepared.statistics)
            untouched = torch.zeros(len(value), dtype=torch.bool, device=value.device)
            return Refined(result.weight, value, value, untouched)
        return refine(result.weight, original, problem, kind, steps, result.mask)

    def _report(
        self,
        result: MethodResult,
        refined: Refined,
        zero: Tensor,
        rows: slice,
        problem: ScaledHessian | None,
        prepared: GroupData,
    ) -> SolveReport:
        settings = self.settings
        count = rows.stop - rows.start
        objectives: dict[str, Any] = {
            "objective_zero": total_of_rows(zero[rows]),
            "objective_before": total_of_rows(refined.before[rows]),
            "objective": total_of_rows(refined.after[rows]),
        }
        notes = prepared.deviations + (problem.deviations if problem else ())
        return SolveReport(
            method=settings.method,
            pattern=str(self.pattern),
            rows=count,
            **objectives,
            relative_error=percentage(objectives["objective"], objectives["objective_zero"]),
            statistic=statistic_name(prepared.statistics),
            tokens=prepared.statistics.tokens if prepared.statistics else 0,
            iterations=result.iterations,
            support_change=float(result.support_change[rows].sum()) / max(count, 1),
            refine=settings.refine,
            refine_steps=settings.refine_steps or 0,
            rows_kept_unrefined=int(refined.kept[rows].sum()),
            damping=problem.damping if problem else 0.0,
            shrinkage=problem.shrinkage if problem else 0.0,
            blocksize=result.blocksize,
            dead_inputs=prepared.dead_inputs,
            products=result.products,
            deviations=notes,
        )


@contextmanager
def naming(layers: Collection[str]) -> Iterator[None]:
    """Has a NumericalError inside name the layers of a group, which share the input."""
    try:
        yield
    except NumericalError as error:
        first = next(iter(layers), "")
        if not first:
            raise
        more = f" and {len(layers) - 1} with the same input" if len(layers) > 1 else ""
        raise NumericalError(f"layer {first}{more}: {error}") from error


def solve_diagonal(original: Tensor, problem: ScaledHessian, pattern: Pattern) -> MethodResult:
    """The exact solution where full shrinkage has made H diagonal: Wanda's mask on (R, C) fp32.

    Kept weights on live columns are not changed; weights on dead columns are 0.
    """
    rows, _ = problem.scale_rows(original)
    mask = keep_mask(pattern, rows.abs())
    no_change = torch.zeros(len(original), device=original.device)
    return MethodResult(original * (mask & problem.live), mask, 1, no_change)


def support_change(before: Tensor, after: Tensor, kept: Tensor) -> Tensor:
    """Share of each row's support that changed between two steps, (R,) fp32.

    before, after: supports (R, C) bool. kept: the final mask (R, C) bool, whose size the change is
    divided by. One entry that leaves the support and one that enters it are one change.
    """
    changed = (before ^ after).sum(dim=1).float() / 2
    return changed / kept.sum(dim=1).clamp(min=1)
