"""What all methods share: checks, stacking the rows of a group's layers, refinement, reports.

Shapes: R rows (output features), C columns (input features).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.config.pattern import Pattern
from pipeline.config.solver import GpuProducts, SolverSettings
from pipeline.runtime.split import ROW_TILE
from pipeline.runtime.threads import LEAST_ROWS, in_pieces, row_pieces
from pipeline.solvers.cost import Costs
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
from pipeline.solvers.types import Solution, SolveReport, Statistics, Team, percentage
from storage.errors import NumericalError

NO_INPUT = "largest weights kept: its inputs are 0 on all of the calibration text"
"""The deviation of a layer about which the calibration says nothing."""


@dataclass(frozen=True)
class GroupData:
    """What a method computed once from the statistics of a group of layers that share an input.

    problem: the regularized Hessian, where the method or its refinement needs it. matrix: a
    (C, C) fp32 matrix of the method, such as a factor. eigenvalue: the largest one of H~, which
    `prox` needs. dead_inputs, deviations: see `SolveReport`. team: the workers that solve rows of
    the group and compute what they share together; None: each computes it.
    """

    statistics: Statistics | None
    problem: ScaledHessian | None = None
    matrix: Tensor | None = None
    eigenvalue: float = 0.0
    dead_inputs: int = 0
    deviations: tuple[str, ...] = ()
    team: Team | None = None

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

    def of(self, rows: slice) -> MethodResult:
        """The result of some of the rows."""
        return replace(
            self,
            weight=self.weight[rows],
            mask=self.mask[rows],
            support_change=self.support_change[rows],
        )


@dataclass(frozen=True)
class _Solved:
    """Solved and refined rows (R, C), and what a report says of them.

    zero: the objective at W = 0, (R,) float64. Others: as in `MethodResult`.
    """

    refined: Refined
    zero: Tensor
    support_change: Tensor
    iterations: int
    blocksize: int | None
    problem: ScaledHessian | None
    products: GpuProducts

    @classmethod
    def joined(cls, parts: Sequence[_Solved]) -> _Solved:
        """All rows, from pieces in their order."""

        def rows(part: Callable[[_Solved], Tensor]) -> Tensor:
            return torch.cat([part(each) for each in parts])

        return cls(
            Refined(
                rows(lambda part: part.refined.weight),
                rows(lambda part: part.refined.before),
                rows(lambda part: part.refined.after),
                rows(lambda part: part.refined.kept),
            ),
            rows(lambda part: part.zero),
            rows(lambda part: part.support_change),
            max(part.iterations for part in parts),
            parts[0].blocksize,
            parts[0].problem,
            parts[0].products,
        )


class BaseSolver(Costs, ABC):
    """One method with its settings.

    A subclass defines `statistic` and `_find`, and `_derive` if it computes something once per
    group. It states its cost as `Costs` says.
    """

    # The statistic of the inputs that choosing the mask needs: "none", "diagonal" or "full".
    statistic: ClassVar[str] = "full"
    # True: optimizes mask and weights together.
    joint: ClassVar[bool] = False
    # True: compiles kernels in a CPU worker.
    compiles: ClassVar[bool] = False
    # Rows, about, of the pieces that the method finds apart, on several threads. None: it is given
    # all rows at once, and itself uses threads.
    least_rows: ClassVar[int | None] = LEAST_ROWS
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
        original = self._stack({"": weight})
        found = torch.empty_like(original)

        def keep(rows: slice, result: MethodResult) -> None:
            found[rows] = result.weight

        self._find_in_pieces(original, prepared, keep)
        return found[: len(weight)]

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
        parts: dict[int, _Solved] = {}

        def finish(rows: slice, result: MethodResult) -> None:
            part = original[rows]
            problem = result.problem or prepared.problem
            refined = self._refine(result, part, problem, prepared)
            zero = objective(torch.zeros_like(part), part, prepared.statistics)
            facts = (result.support_change, result.iterations, result.blocksize)
            parts[rows.start] = _Solved(refined, zero, *facts, problem, result.products)

        with naming(weights):
            self._find_in_pieces(original, prepared, finish)
        solved = _Solved.joined([parts[start] for start in sorted(parts)])
        solutions: dict[str, Solution] = {}
        start = 0
        for name, weight in weights.items():
            rows = slice(start, start + weight.shape[0])
            # -0.0 + 0.0 is 0.0: all pruned entries have the same bits.
            pruned = solved.refined.weight[rows] + 0.0
            solutions[name] = Solution(pruned, self._report(solved, rows, prepared))
            start = rows.stop
        return solutions

    def _find_in_pieces(
        self,
        original: Tensor,
        prepared: GroupData,
        use: Callable[[slice, MethodResult], None],
    ) -> None:
        """Calls `use` with each piece of the rows of `original` (R, C) and the method's result.

        Pieces are found and used on several threads at once.
        """
        pieces = row_pieces(original, self.least_rows or LEAST_ROWS)
        if not self.separable:
            pieces = [slice(0, len(original))]
        whole = self._found(original, prepared) if self.least_rows is None else None

        def find(rows: slice) -> None:
            found = self._found(original[rows], prepared) if whole is None else whole.of(rows)
            use(rows, found)

        in_pieces(find, pieces)

    def _stack(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The rows of all layers, (R, C) fp32, padded with zero rows to a multiple of 16.

        CPU matrix products use other code, which rounds in another order, for few rows and for
        remainders of a tile. With whole tiles a row slice gives the same bytes as the whole layer.
        There is no padding where the method compares rows with each other.
        """
        parts = [weight.detach().float() for weight in weights.values()]
        missing = -sum(len(part) for part in parts) % ROW_TILE
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

    def _report(self, solved: _Solved, rows: slice, prepared: GroupData) -> SolveReport:
        """The report of the layer that has these rows."""
        settings, problem, refined = self.settings, solved.problem, solved.refined
        count = rows.stop - rows.start
        objectives: dict[str, Any] = {
            "objective_zero": total_of_rows(solved.zero[rows]),
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
            iterations=solved.iterations,
            support_change=float(solved.support_change[rows].sum()) / max(count, 1),
            refine=settings.refine,
            refine_steps=settings.refine_steps or 0,
            rows_kept_unrefined=int(refined.kept[rows].sum()),
            damping=problem.damping if problem else 0.0,
            shrinkage=problem.shrinkage if problem else 0.0,
            blocksize=solved.blocksize,
            dead_inputs=prepared.dead_inputs,
            products=solved.products,
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
