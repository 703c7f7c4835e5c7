"""The regularized and scaled Hessian H~ of a group: dead columns, shrinkage, damping, scaling.

It is computed once per group of layers that share an input, from statistics only, not from weights:

    H  = sum / tokens,   H_jj = 0 marks a dead column
    H <- (1 - a) H + a diag(H)                  shrinkage a
    H <- H + damping * mean(live diag H) * I    damping
    H~ = D^-1 H D^-1, D = diag(H)^1/2           so W~ = W D

H~ has a unit diagonal. So D and the factor on the off-diagonal entries determine it, and the
(C, C) matrix is formed only where a solver needs it. Shapes: R rows, C columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pipeline.config.solver import ESTIMATE, SolverSettings
from pipeline.solvers.types import Statistics
from storage.errors import NumericalError

_PANEL = 256
_POWER_STEPS = 64
_NOISE_FACTOR = 2.0
_DAMPING_FACTOR = 0.3
_DAMPING_LIMIT = 0.3
_DAMPING_RAISES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_TOO_LARGE = (
    "the inputs are not finite, or too large for their squares to be summed in float32; leave the "
    "layer dense (--override LAYER=dense)"
)


@dataclass(frozen=True)
class ScaledHessian:
    """H~ of a group of layers, and the scaling of weights that goes with it.

    statistics: the sums that H~ is computed from. live: (C,) bool, False on dead columns. scale:
    (C,) fp32, the diagonal of D, 1 on dead columns. inverse_scale: (C,) fp32, its inverse, 0 on
    dead columns: they do not interact with other columns. deviations: see `SolveReport`.
    """

    statistics: Statistics
    live: Tensor
    scale: Tensor
    inverse_scale: Tensor
    shrinkage: float
    damping: float
    deviations: tuple[str, ...] = ()

    @property
    def hessian(self) -> Tensor:
        """(C, C) fp32 sum of x x^T; with inputs in its place, it is computed at each access."""
        return require_hessian(self.statistics)

    def write(self, ridge: float = 0.0, out: Tensor | None = None) -> Tensor:
        """H~ + ridge * I as (C, C) fp32, into `out` if given; no other C x C is allocated."""
        hessian = self.hessian
        out = torch.empty_like(hessian) if out is None else out
        # One factor after the other: their product may overflow or underflow in fp32.
        left = self.inverse_scale * ((1 - self.shrinkage) / self.statistics.tokens)
        torch.mul(hessian, left[:, None], out=out)
        out.mul_(self.inverse_scale)
        out.diagonal().fill_(1 + ridge)
        return out

    def multiply(self, rows: Tensor) -> Tensor:
        """`rows` (R, C) fp32 times H~, (R, C) fp32, without forming H~."""
        inputs, scaled = self.statistics.inputs, rows * self.inverse_scale
        product = scaled @ self.hessian if inputs is None else (scaled @ inputs.T) @ inputs
        return product.mul_(self._right_scale).addcmul_(rows, self.ridge)

    def scaled_inputs(self) -> Tensor:
        """U (tokens, C) fp32 with H~ = U^T U + diag(ridge). Only with inputs for a Hessian."""
        assert self.statistics.inputs is not None
        factor = math.sqrt((1 - self.shrinkage) / self.statistics.tokens)
        return self.statistics.inputs * (self.inverse_scale * factor)

    @cached_property
    def _right_scale(self) -> Tensor:
        """(C,) fp32: factor on the columns of the sums: D^-1, shrinkage and 1 / tokens."""
        return self.inverse_scale * ((1 - self.shrinkage) / self.statistics.tokens)

    @cached_property
    def ridge(self) -> Tensor:
        """(C,) fp32: what is added to the diagonal of the scaled sums to make it 1."""
        return 1 - diagonal_of(self.statistics) * self._right_scale * self.inverse_scale

    def scale_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W~ = W D, each row scaled to mean magnitude 1 over the live columns.

        (R, C) fp32 -> (R, C) fp32 and the row sizes (R, 2), which `unscale_rows` needs.
        Each row has a scale of its own, so a row slice needs nothing from the rest of the layer.
        Rows of zeros stay zero. Factors of at most 1 are applied one after another, so that weights
        and Hessians of 1e30 do not overflow.
        """
        peak = weight.abs().amax(dim=1, keepdim=True)
        peak = torch.where(peak > 0, peak, torch.ones_like(peak))
        rows = (weight / peak).mul_(self._relative_scale)
        size = rows.abs().sum(dim=1, keepdim=True) / self.live.sum().clamp(min=1)
        size = torch.where(size > 0, size, torch.ones_like(size))
        return rows.div_(size), torch.cat([size, peak], dim=1)

    def unscale_rows(self, rows: Tensor, sizes: Tensor) -> Tensor:
        """The inverse of `scale_rows`: (R, C), row sizes (R, 2) -> weights, 0 on dead columns."""
        relative = self._relative_scale
        back = torch.where(relative > 0, 1 / relative, torch.zeros_like(relative))
        return (rows * sizes[:, :1]).mul_(back).mul_(sizes[:, 1:])

    @cached_property
    def _relative_scale(self) -> Tensor:
        """(C,) fp32: D divided by its largest live entry, 0 on dead columns."""
        scale = torch.where(self.live, self.scale, torch.zeros_like(self.scale))
        top = scale.amax()
        return scale / torch.where(top > 0, top, torch.ones_like(top))

    @cached_property
    def largest_eigenvalue(self) -> float:
        """The largest eigenvalue of H~, by 64 steps of the power method.

        The power method converges from below, so 2 % are added. Gradient descent with step 1 / L
        converges for every L above half the largest eigenvalue.
        """
        columns = self.statistics.columns
        # A fixed, irregular start vector: ones can be orthogonal to the leading eigenvector.
        index = torch.arange(columns, dtype=torch.float32, device=self.scale.device)
        vector = 1 + 0.5 * torch.cos(index * 2.399963)
        norm = vector.norm()
        for _ in range(_POWER_STEPS):
            vector = self.multiply(vector[None] / norm)[0]
            norm = vector.norm()
        return 1.02 * max(float(norm), 1.0)

    def objective(self, undamped: Tensor, change: Tensor) -> Tensor:
        """The objective with the regularized H per row, (R,) float64.

        undamped: (R,) float64, the objective with the plain H. change: dW (R, C).
        """
        mean = diagonal_of(self.statistics).double() / self.statistics.tokens
        # The regularized H minus (1 - a) H is diagonal. Dead columns cost nothing.
        extra = (self.scale.double().square() - (1 - self.shrinkage) * mean) * self.live
        return (1 - self.shrinkage) * undamped + change.double().square() @ extra


def require_hessian(statistics: Statistics | None) -> Tensor:
    """(C, C) fp32 sum of x x^T. Raises NumericalError where the statistics are not full."""
    if statistics is None or not statistics.full:
        raise NumericalError("this solve needs the full Hessian, which the statistics do not have")
    if statistics.inputs is not None:
        return statistics.inputs.T @ statistics.inputs
    assert statistics.hessian is not None
    return statistics.hessian


def check_statistics(statistics: Statistics) -> None:
    """Raise NumericalError for 0 tokens, wrong shapes, NaN, Inf or a negative diagonal."""
    columns = statistics.columns
    if statistics.tokens < 1:
        raise NumericalError("the statistics hold no calibration tokens")
    diagonal = statistics.diagonal
    if statistics.inputs is not None:
        if statistics.inputs.shape != (statistics.tokens, columns):
            shape = tuple(statistics.inputs.shape)
            raise NumericalError(
                f"the inputs have shape {shape}, not ({statistics.tokens}, {columns})"
            )
        diagonal = diagonal_of(statistics)
    elif statistics.hessian is not None:
        if statistics.hessian.shape != (columns, columns):
            shape = tuple(statistics.hessian.shape)
            raise NumericalError(f"the Hessian has shape {shape}, not ({columns}, {columns})")
        # NaN propagates to the extremes, which take one pass and no memory.
        if not bool(torch.isfinite(torch.stack(statistics.hessian.aminmax())).all()):
            raise NumericalError(f"the Hessian holds NaN or Inf: {_TOO_LARGE}")
        diagonal = statistics.hessian.diagonal()
    if diagonal is not None:
        if diagonal.shape != (columns,):
            raise NumericalError(
                f"the diagonal has shape {tuple(diagonal.shape)}, not ({columns},)"
            )
        if not bool(torch.isfinite(diagonal).all()):
            raise NumericalError(f"the sums of squares hold NaN or Inf: {_TOO_LARGE}")
        if bool((diagonal < 0).any()):
            raise NumericalError("the diagonal is negative somewhere: not a sum of squares")


def diagonal_of(statistics: Statistics | None) -> Tensor:
    """(C,) fp32 sum of x_j^2, from whichever statistic there is. Raises NumericalError for none."""
    if statistics is not None and statistics.hessian is not None:
        return statistics.hessian.diagonal()
    if statistics is not None and statistics.inputs is not None:
        return statistics.inputs.square().sum(dim=0)
    if statistics is None or statistics.diagonal is None:
        raise NumericalError(
            "this solve needs the diagonal of the Hessian, which the statistics do not have"
        )
    return statistics.diagonal


def dead_inputs(statistics: Statistics) -> int:
    """How many of the C inputs are 0 in all tokens, or too small to be squared in fp32.

    0 where there is no statistic.
    """
    diagonal = statistics.diagonal
    if diagonal is None and statistics.full:
        diagonal = diagonal_of(statistics)
    return 0 if diagonal is None else int((diagonal == 0).sum())


def joined(first: Statistics, second: Statistics) -> Statistics:
    """The sum of the statistics of two sets of sequences; allocates at most one C x C."""
    tokens = first.tokens + second.tokens
    hessian = diagonal = inputs = None
    if first.inputs is not None and second.inputs is not None and tokens < first.columns:
        inputs = torch.cat([first.inputs, second.inputs])
    elif first.full and second.full:
        hessian = require_hessian(first) + require_hessian(second)
    if first.diagonal is not None and second.diagonal is not None:
        diagonal = first.diagonal + second.diagonal
    return Statistics(
        columns=first.columns,
        tokens=tokens,
        sequences=first.sequences + second.sequences,
        diagonal=diagonal,
        hessian=hessian,
        inputs=inputs,
    )


def moments(statistics: Statistics, rows: slice) -> Tensor:
    """Rows of the sum of x x^T, (len(rows), C) fp32."""
    if statistics.inputs is not None:
        return statistics.inputs[:, rows].T @ statistics.inputs
    return require_hessian(statistics)[rows]


def scaled_hessian(
    statistics: Statistics | None, *, damping: float, shrinkage: float
) -> ScaledHessian:
    """Regularize and scale the full Hessian: see the top of this module.

    damping: as a share of the mean live diagonal. shrinkage: 0 to 1. Raises NumericalError where
    the statistics are not full or `check_statistics` refuses them.
    """
    if statistics is None or not statistics.full:
        require_hessian(statistics)
    assert statistics is not None
    check_statistics(statistics)
    mean = diagonal_of(statistics).double() / statistics.tokens
    live = mean > 0
    ridge = damping * (mean.sum() / live.sum().clamp(min=1))
    diagonal = torch.where(live, mean + ridge, torch.ones_like(mean))
    scale = diagonal.sqrt()
    return ScaledHessian(
        statistics=statistics,
        live=live,
        scale=scale.float(),
        inverse_scale=torch.where(live, 1 / scale, torch.zeros_like(scale)).float(),
        shrinkage=shrinkage,
        damping=damping,
    )


def raise_damping(problem: ScaledHessian) -> ScaledHessian:
    """The same problem with the next larger damping of 1e-4, 1e-3, 1e-2, 0.1, 1.

    Used where a Cholesky factorization fails. Raises NumericalError if damping is 1 already.
    """
    for damping in _DAMPING_RAISES:
        if damping > problem.damping:
            raised = scaled_hessian(
                problem.statistics, damping=damping, shrinkage=problem.shrinkage
            )
            note = f"damping raised from {problem.damping:g} to {damping:g}: not positive definite"
            return replace(raised, deviations=(*problem.deviations, note))
    raise NumericalError(
        f"the Hessian is not positive definite even at damping {problem.damping:g}; use a "
        "--shrinkage of 0.5 or more, or wanda for this layer, which needs the diagonal alone "
        "(--override LAYER=wanda)"
    )


def regularization_of(settings: SolverSettings, statistics: Statistics) -> tuple[float, float]:
    """(damping, shrinkage) as numbers, estimated from the statistics if the settings say so.

    Raises ValueError for unresolved settings and for shrinkage "auto".
    """
    if settings.damping is None or settings.shrinkage is None:
        raise ValueError("the settings are not resolved")
    if settings.shrinkage == ESTIMATE:
        damping, shrinkage = estimate(statistics)
        return max(damping, settings.damping), shrinkage
    if isinstance(settings.shrinkage, str):
        raise ValueError("shrinkage 'auto' must be chosen first: choose_regularization")
    return settings.damping, settings.shrinkage


def estimate(statistics: Statistics) -> tuple[float, float]:
    """(damping, shrinkage) estimated from the sampling noise of H: from its entries and tokens.

    Shrinkage: x / (1 + 2 x), where x is twice the intensity that minimizes the expected squared
    error of the correlations r (Schäfer & Strimmer, "A Shrinkage Approach to Large-Scale
    Covariance Matrix Estimation", with uncorrelated columns as target): the sum of var(r) over the
    sum of r^2, with var(r) = (1 - r^2)^2 / tokens. Twice, because tokens of a text are not
    independent samples; bounded by 1/2, because solvers exploit correlations.
    Damping: 0.3 sqrt(live columns / tokens) times the geometric mean of the diagonal, which a few
    large columns do not raise.
    The constants were fitted to held-out errors: three layers at 512 tokens, and twelve layers of
    SmolLM2-135M at 4,096, 16,384 and 65,536 tokens, where the result is 2.3 %, 1.1 % and 0.7 %
    above the best of a grid of 30 settings.
    Raises NumericalError where the statistics are not full or `check_statistics` refuses them.
    """
    if not statistics.full:
        require_hessian(statistics)
    check_statistics(statistics)
    diagonal = diagonal_of(statistics)
    live = diagonal > 0
    columns = int(live.sum())
    inverse = torch.where(live, diagonal.double().rsqrt(), torch.zeros_like(diagonal).double())
    inverse = inverse.float()
    noise = torch.zeros((), dtype=torch.float64, device=diagonal.device)
    signal = torch.zeros_like(noise)
    for top in range(0, statistics.columns, _PANEL):
        rows = slice(top, top + _PANEL)
        square = (
            ((moments(statistics, rows) * inverse[rows, None]) * inverse).square_().clamp_(max=1)
        )
        signal += square.sum(dtype=torch.float64)
        noise += square.neg_().add_(1).square_().sum(dtype=torch.float64)
    # On the diagonal r = 1 has no noise. Dead columns have r = 0, which would count as noise.
    dead = statistics.columns - columns
    noise -= dead * (statistics.columns + columns)
    signal -= columns
    if not columns or float(signal) <= 0:
        return 0.0, 0.0
    ratio = _NOISE_FACTOR * float(noise) / statistics.tokens / float(signal)
    sizes = diagonal[live].double()
    typical = float(sizes.log().mean().exp() / sizes.mean())
    damping = _DAMPING_FACTOR * typical * math.sqrt(columns / statistics.tokens)
    return min(damping, _DAMPING_LIMIT), ratio / (1 + 2 * ratio)
