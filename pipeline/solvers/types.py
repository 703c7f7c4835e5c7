"""The types that all solvers share: statistics in, solutions and reports out.

Convention: statistics are fp32 *sums* and counts. A sum is divided by its count only where the
mean is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor


class Team(Protocol):
    """Workers that compute something together: each has the same input and makes the same calls.

    index: this worker's number in the team. size: of how many.
    """

    @property
    def index(self) -> int: ...

    @property
    def size(self) -> int: ...

    def send(self, tensor: Tensor, owner: int) -> None:
        """Overwrites a contiguous tensor, on all members, by that of the member `owner`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Second moments of the inputs x (C,) of a group of layers that share them.

    columns: C. tokens: number of inputs x in the sums. sequences: number of calibration sequences
    they come from. diagonal: (C,) fp32, sum of x_j^2. hessian: (C, C) fp32, sum of x x^T. inputs:
    (tokens, C) fp32, the inputs themselves instead of the Hessian, where tokens < C.
    """

    columns: int
    tokens: int
    sequences: int
    diagonal: Tensor | None = None
    hessian: Tensor | None = None
    inputs: Tensor | None = None

    @property
    def full(self) -> bool:
        """Whether all second moments are known, from the Hessian or from the inputs."""
        return self.hessian is not None or self.inputs is not None


@dataclass(frozen=True, kw_only=True)
class SolveReport:
    """Results of one solve of one layer or row slice.

    Objectives are L = tr(dW H dW^T) with the undamped mean Hessian H, summed over `rows` rows:
    `objective_zero` at W = 0, `objective_before` before refinement, `objective` at the end.
    `relative_error` is 100 * objective / objective_zero, in percent: see `percentage`.
    `statistic` is what was used as H: "full", "diagonal", or "none" (the identity). `tokens`: the
    calibration tokens that reached the layer; for an expert, those routed to it.
    `support_change`: share of the support that the last step (the last iteration, or the final
    projection) changed. `dead_inputs`: how many of the C inputs are 0 in all calibration tokens, so
    that nothing is known of their weights. `products`: the precision of the products of the
    method's iterations, "float32" or "tf32"; all else is fp32 or better. `deviations`: sentences on
    where the solve departed from its settings.
    """

    method: str
    pattern: str
    rows: int
    objective_zero: float
    objective_before: float
    objective: float
    relative_error: float | None
    statistic: str
    tokens: int
    iterations: int
    support_change: float
    refine: str
    refine_steps: int
    rows_kept_unrefined: int
    damping: float
    shrinkage: float
    blocksize: int | None = None
    dead_inputs: int = 0
    products: str = "float32"
    deviations: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict of JSON values."""
        return {**asdict(self), "deviations": list(self.deviations)}

    @classmethod
    def from_json(cls, payload: Mapping[str, Any]) -> SolveReport:
        """The inverse of `to_json`."""
        return cls(**{**payload, "deviations": tuple(payload["deviations"])})


@dataclass(frozen=True)
class Solution:
    """A pruned weight (R, C) in fp32, and the report of its solve."""

    weight: Tensor
    report: SolveReport


def percentage(objective: float, objective_zero: float) -> float | None:
    """100 * objective / objective_zero. For objective_zero = 0: 0 where both are 0, or else None.

    It is undefined where the outputs are 0 (or cancel) on the calibration text, and pruning changes
    them.
    """
    if objective_zero > 0:
        return 100 * objective / objective_zero
    return 0.0 if objective <= 0 else None


def merge_reports(reports: Sequence[SolveReport]) -> SolveReport:
    """The report of a layer from those of its row slices, in row order.

    Objectives are summed; `support_change` is the mean over rows. Raises ValueError for no reports.
    """
    if not reports:
        raise ValueError("no reports to merge")
    rows = sum(r.rows for r in reports)
    total = sum(r.objective for r in reports)
    zero = sum(r.objective_zero for r in reports)
    return replace(
        reports[0],
        rows=rows,
        objective_zero=zero,
        objective_before=sum(r.objective_before for r in reports),
        objective=total,
        relative_error=percentage(total, zero),
        iterations=max(r.iterations for r in reports),
        # Rounded, so that it does not depend on how the rows were cut into slices.
        support_change=round(sum(r.support_change * r.rows for r in reports) / max(rows, 1), 9),
        rows_kept_unrefined=sum(r.rows_kept_unrefined for r in reports),
        deviations=tuple(dict.fromkeys(d for r in reports for d in r.deviations)),
    )
