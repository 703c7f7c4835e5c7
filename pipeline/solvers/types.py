"""The small types every solver speaks: statistics in, solutions and reports out.

Convention, everywhere: statistics are fp32 *sums* plus counts; a division by a count happens
only where the mean is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from pipeline.solvers.pattern import Pattern as Pattern
from storage.errors import ConfigError

METHOD_NAMES = ("magnitude", "wanda", "sparsegpt", "prox", "prox_admm")
REFINEMENTS = ("auto", "none", "gradient", "cg")

# Values of ``shrinkage`` that are no numbers: chosen on two halves, or from H and its counts.
AUTO, ESTIMATE = "auto", "estimate"

# Regularization of each method where neither option is given: (damping, shrinkage). Wanda and
# magnitude choose without; theirs is for a refinement.
DEFAULT_REGULARIZATION: dict[str, tuple[float, float | str]] = {
    "magnitude": (0.001, ESTIMATE),
    "wanda": (0.001, ESTIMATE),
    "sparsegpt": (0.01, 0.0),
    "prox": (0.01, 0.0),
    "prox_admm": (0.001, ESTIMATE),
}
_DAMPING_BESIDE_SHRINKAGE = 0.01
DEFAULT_REFINE_STEPS = {"none": 0, "gradient": 1000, "cg": 12}
# ADMM ends near the minimizer on its support: twice as many lower the error by at most 0.2 %.
_ADMM_CG_STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Second moments of the inputs x (C,) of a group of layers that share them.

    columns: C. tokens: number of x summed. sequences: calibration sequences they came from.
    diagonal: (C,) fp32, sum of x_j^2. hessian: (C, C) fp32, sum of x x^T. inputs: (tokens, C) fp32,
    the x themselves in place of the hessian, where they are fewer than C.
    """

    columns: int
    tokens: int
    sequences: int
    diagonal: Tensor | None = None
    hessian: Tensor | None = None
    inputs: Tensor | None = None

    @property
    def full(self) -> bool:
        """Whether all second moments are known, by a matrix or by the inputs."""
        return self.hessian is not None or self.inputs is not None


@dataclass(frozen=True, kw_only=True)
class SolverSettings:
    """Everything a solve depends on besides its tensors. Scalars only, so it is stored as JSON.

    None means the method's own default; ``resolved`` fills them in.
    """

    method: str = "prox_admm"
    pattern: str = "2:4"
    # Added to the diagonal of the mean Hessian, as a multiple of its live mean.
    damping: float | None = None
    # H <- (1 - a) H + a diag(H); 0 none, 1 diagonal only. "estimate": from the noise of H, which
    # sets the damping too, at least to the one given (regularize.estimate). "auto": chosen on two
    # halves of the calibration; the caller resolves it (choose_regularization).
    shrinkage: float | str | None = None
    # SparseGPT: columns per lazy update, or "auto": the best known for the width (auto_blocksize).
    blocksize: int | str | None = None
    # Improvement of the kept weights on the fixed mask.
    refine: str = "auto"
    refine_steps: int | None = None
    # prox: lambda_k = prox_lambda * prox_growth^k on rows scaled to mean magnitude 1.
    prox_lambda: float = 1e-3
    prox_growth: float = 1.01
    # prox_admm: iterations in all; those of the first penalty, after which the second takes over;
    # the first penalty, and the second as a multiple of what the bulk of H~ asks for
    # (prox_admm.settled_penalty); lambda at first and its growth; over-relaxation.
    admm_iterations: int = 60
    admm_first_iterations: int = 22
    admm_rho: float = 0.185
    admm_rho_factor: float = 0.9
    admm_lambda: float = 0.067
    admm_lambda_growth: float = 1.0744
    admm_relaxation: float = 1.7

    def __post_init__(self) -> None:
        if self.method not in METHOD_NAMES:
            raise ConfigError(
                f"unknown method {self.method!r}: choose of {', '.join(METHOD_NAMES)}"
            )
        if self.refine not in REFINEMENTS:
            raise ConfigError(f"unknown refine {self.refine!r}: choose of {', '.join(REFINEMENTS)}")
        Pattern.parse(self.pattern)
        if isinstance(self.shrinkage, str):
            if self.shrinkage not in (AUTO, ESTIMATE):
                raise ConfigError(
                    f"shrinkage {self.shrinkage!r} must be 'estimate', 'auto' or within [0, 1]"
                )
        elif self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise ConfigError(f"shrinkage {self.shrinkage} must lie in [0, 1]")
        if self.damping is not None and not (0 <= self.damping < math.inf):
            raise ConfigError(f"damping {self.damping} must be a finite number, 0 or more")
        self._check_counts()

    def _check_counts(self) -> None:
        if isinstance(self.blocksize, str) and self.blocksize != "auto":
            raise ConfigError(f"blocksize {self.blocksize!r} must be 'auto' or a whole number")
        for name in ("blocksize", "admm_iterations", "admm_first_iterations"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{name} {value} must be 1 or more")
        if self.refine_steps is not None and self.refine_steps < 0:
            raise ConfigError(f"refine_steps {self.refine_steps} must be 0 or more")
        for name in ("prox_lambda", "admm_rho", "admm_rho_factor", "admm_lambda"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} {getattr(self, name)} must be above 0")
        if not 1.0005 <= self.prox_growth < math.inf:
            raise ConfigError(f"prox_growth {self.prox_growth} must be 1.0005 or more")
        if not 1 <= self.admm_lambda_growth < math.inf:
            raise ConfigError(f"admm_lambda_growth {self.admm_lambda_growth} must be 1 or more")
        if not 1 <= self.admm_relaxation < 2:
            raise ConfigError(f"admm_relaxation {self.admm_relaxation} must lie in [1, 2)")

    @property
    def parsed_pattern(self) -> Pattern:
        """``pattern`` as a Pattern."""
        return Pattern.parse(self.pattern)

    def resolved(self) -> SolverSettings:
        """The same settings with every None and "auto" refinement replaced by the default.

        A shrinkage of "auto" is left for ``choose_regularization``, "estimate" for ``prepare``.
        A damping given alone means that damping and no shrinkage.
        """
        damping, shrinkage = DEFAULT_REGULARIZATION[self.method]
        if self.damping is not None:
            shrinkage = 0.0
        elif isinstance(self.shrinkage, float | int):
            damping = _DAMPING_BESIDE_SHRINKAGE
        refine = self.refine
        if refine == "auto":
            refine = "cg" if self.method in ("prox", "prox_admm") else "none"
        steps = DEFAULT_REFINE_STEPS[refine]
        if self.method == "prox_admm" and refine == "cg":
            steps = _ADMM_CG_STEPS
        return replace(
            self,
            damping=damping if self.damping is None else self.damping,
            shrinkage=shrinkage if self.shrinkage is None else self.shrinkage,
            blocksize=128 if self.blocksize is None else self.blocksize,
            refine=refine,
            refine_steps=steps if self.refine_steps is None else self.refine_steps,
        )

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON scalars; ``SolverSettings(**it)`` gives the settings back."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SolveReport:
    """Facts of one solve of one layer or row slice.

    Objectives are L = tr(dW H dW^T) with the undamped mean Hessian, summed over ``rows``:
    ``objective_zero`` at W = 0, ``objective_before`` before refinement, ``objective`` at the end.
    ``relative_error`` is 100 * objective / objective_zero (0 where both are 0).
    ``statistic`` names what stood for H: "full", "diagonal", or "none" (the identity); ``tokens``
    were seen by the layer: an expert sees its own.
    ``support_change``: share of the support that the last step (the last iteration, or the final
    projection) changed. ``deviations``: what was done other than asked, in words.
    """

    method: str
    pattern: str
    rows: int
    objective_zero: float
    objective_before: float
    objective: float
    relative_error: float
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
    deviations: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values."""
        return {**asdict(self), "deviations": list(self.deviations)}

    @classmethod
    def from_json(cls, payload: Mapping[str, Any]) -> SolveReport:
        """The inverse of ``to_json``."""
        return cls(**{**payload, "deviations": tuple(payload["deviations"])})


@dataclass(frozen=True)
class Solution:
    """A pruned weight (R, C) in fp32, and what is known about it."""

    weight: Tensor
    report: SolveReport


def percentage(objective: float, objective_zero: float) -> float:
    """100 * objective / objective_zero; 0 where nothing could be lost, inf where something was."""
    if objective_zero > 0:
        return 100 * objective / objective_zero
    return 0.0 if objective <= 0 else math.inf


def merge_reports(reports: Sequence[SolveReport]) -> SolveReport:
    """The report of a layer from those of its row slices, in row order; ValueError if none."""
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
        # Rounded, so that it does not tell how the rows were cut.
        support_change=round(sum(r.support_change * r.rows for r in reports) / max(rows, 1), 9),
        rows_kept_unrefined=sum(r.rows_kept_unrefined for r in reports),
        deviations=tuple(dict.fromkeys(d for r in reports for d in r.deviations)),
    )


class Prepared(Protocol):
    """What a solver derives once from the statistics of a group. Opaque to the caller."""


class Solver(Protocol):
    """One pruning method with its settings. Pure: arguments are never changed."""

    needs: str
    """The statistic it asks for, so that wanda never makes a caller allocate C x C."""
    separable: bool
    """False where the choice compares rows: such a layer must come in one piece."""

    def prepare(self, statistics: Statistics | None) -> Any:
        """All that belongs to the group; equal on every rank that has equal statistics."""
        ...

    def solve_group(self, weights: Mapping[str, Tensor], prepared: Any) -> dict[str, Solution]:
        """Prune layers (or row slices) that share an input; factorizations serve them all."""
        ...

    def solve(self, weight: Tensor, prepared: Any) -> Solution:
        """Prune one layer or row slice (R, C)."""
        ...
