"""`prox_admm`, the default: the proximal operator inside ADMM, the quadratic solved exactly.

    V <- (W~0 H~ + rho (Z - U)) (H~ + rho I)^-1
    W <- r V + (1 - r) Z              (over-relaxation r)
    Z <- prox_lambda(W + U)           (2:4; other patterns: projection on the pattern)
    U <- U + W - Z

lambda, which contains 1/rho, grows at every iteration; the inverse stays the same. It is computed
explicitly and twice: first at a small rho, which lets supports change, then at the rho that the
spectrum of H~ calls for (`settled_penalty`). Where rho grows, U is scaled down by the same factor.
After a fixed number of iterations the two largest of four are kept. Both inverses are shared by
all rows of all layers of the group.

On a GPU the products with the inverse are TF32: an iteration need not be exact, since it leads to a
mask, and refinement then finds the weights in fp32. The inverse itself is fp32. There the first
line is computed in the form that rounding harms least, which is the same number:

    V <- W~0 + rho (Z - U - W~0) (H~ + rho I)^-1

W~0 H~ is large along the leading directions of H~, and what rounding makes of it in the others the
inverse does not make smaller (benchmarks/product_precision.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pipeline.config.pattern import Pattern
from pipeline.config.solver import GpuKernels, SolverSettings
from pipeline.runtime.device import tf32_products
from pipeline.runtime.threads import in_pieces, row_pieces
from pipeline.solvers.base import (
    BaseSolver,
    GroupData,
    MethodResult,
    solve_diagonal,
    support_change,
)
from pipeline.solvers.cost import (
    INVERSE_PANEL,
    OPERATIONS_PER_BYTE,
    TF32_SHARE,
    MethodCost,
    SolveCounts,
    elementwise_operations,
    entry_bytes,
    inverse_operations,
    together_operations,
)
from pipeline.solvers.hessian import ScaledHessian, raise_damping
from pipeline.solvers.inverse import Inverse, inverse_of
from pipeline.solvers.kernels.cholesky import sweep_launches, sweep_operations
from pipeline.solvers.kernels.prox_operator import operator_work, prox_operator
from pipeline.solvers.masks import keep_mask
from pipeline.solvers.types import Team

HELP = "the proximal operator inside ADMM, which solves the quadratic exactly"
# ADMM ends near the minimizer on its support: 12 steps lower the error by at most 0.2 % more.
DEFAULTS = {"damping": 0.001, "shrinkage": "estimate", "refine": "cg", "refine_steps": 6}

# lambda, relaxation, the factor on U, and rho of the next iteration.
Numbers = tuple[float, float, float, float]
_OPERATOR_STEPS = 2  # of Newton's method
# Read and written per entry in an iteration of the centered form, which is another right-hand side.
_CENTERED_BYTES = 20.0


class ProxAdmmSolver(BaseSolver):
    """ADMM with the proximal operator in the coordinates where H~ has a unit diagonal.

    Memory beyond the Hessian: one C x C for the inverse (and two C x 512 panels where it is
    computed in blocks), and about nine (R, C), all fp32.
    Time: one product (R, C) x (C, C) per iteration, two at the start, one per refinement step,
    about three for the report, and C^3 operations for each of the two inverses. With n inputs in
    place of the Hessian: two products (R, C) x (C, n) per iteration, and no C x C.
    """

    joint = True
    compiles = True
    least_rows = None
    rows_held = 9
    method_settings = (
        "kernels",
        "admm_iterations",
        "admm_first_iterations",
        "admm_rho",
        "admm_rho_factor",
        "admm_lambda",
        "admm_lambda_growth",
        "admm_relaxation",
    )

    def _find(self, original: Tensor, prepared: GroupData) -> MethodResult:
        problem = prepared.problem
        assert problem is not None
        if problem.shrinkage == 1:
            return solve_diagonal(original, problem, self.pattern)
        dense = problem.statistics.inputs is None
        buffer = torch.empty_like(problem.hessian) if dense else None
        while True:
            result = self._iterate(original, problem, buffer, prepared.team)
            if result is not None:
                return result
            problem = raise_damping(problem)

    def _iterate(
        self,
        original: Tensor,
        problem: ScaledHessian,
        buffer: Tensor | None,
        team: Team | None,
    ) -> MethodResult | None:
        """All iterations; None where H~ + rho I was not positive definite.

        The iterations with one inverse are run piece by piece of the rows, on several threads.
        original: (R, C) fp32. buffer: (C, C) fp32 for the inverse; None with inputs for a Hessian.
        team: see `GroupData`.
        """
        settings = self.settings
        early = inverse_of(problem, settings.admm_rho, buffer, team)
        if early is None:
            return None
        settled = settings.admm_rho_factor * settled_penalty(early, problem, settings.admm_rho)
        schedule, rounded = self._schedule(settled), self._rounds(original.device.type)
        pieces = row_pieces(original)
        states: dict[int, _Rows] = {}

        def first(rows: slice) -> None:
            state = _Rows(original[rows], problem, settings, rounded)
            state.run(early, schedule[0])
            states[rows.start] = state

        in_pieces(first, pieces)
        late = inverse_of(problem, schedule[0][-1][3], buffer, team) if schedule[1] else early
        if late is None:
            return None
        weight, mask = torch.empty_like(original), torch.empty_like(original, dtype=torch.bool)
        changed = original.new_empty(len(original))

        def rest(rows: slice) -> None:
            state = states.pop(rows.start)
            state.run(late, schedule[1])
            mask[rows], weight[rows], changed[rows] = state.result()

        in_pieces(rest, pieces)
        return MethodResult(
            *(weight, mask, settings.admm_iterations, changed),
            problem=problem,
            products="tf32" if rounded else "float32",
        )

    def _schedule(self, settled: float) -> tuple[list[Numbers], list[Numbers]]:
        """`Numbers` of the iterations with the first inverse, and of those with the second.

        settled: the late rho. Where it does not grow, all iterations are of the first kind.
        """
        settings = self.settings
        rho, strength, switch = settings.admm_rho, settings.admm_lambda, settings.admm_iterations
        numbers: list[Numbers] = []
        for iteration in range(1, settings.admm_iterations + 1):
            shrink = 1.0
            if iteration == settings.admm_first_iterations < settings.admm_iterations:
                shrink = rho / max(settled, rho)
                rho /= shrink
                switch = iteration if shrink < 1 else switch
            numbers.append((strength, settings.admm_relaxation, shrink, rho))
            strength *= settings.admm_lambda_growth
        return numbers[:switch], numbers[switch:]

    def _rounds(self, device: str) -> bool:
        """Whether the iterations' products are TF32 on a device, by its torch type."""
        return device == "cuda" and self.settings.gpu_products == "tf32"

    def method_cost(self, columns: int, device: str) -> MethodCost:
        """One product and one application of the operator per iteration, and the inverses."""
        iterations = self.settings.admm_iterations
        _, moved = self._operator_work(1, columns, device)
        elementwise = elementwise_operations(columns, device) + OPERATIONS_PER_BYTE * moved
        return MethodCost(
            products=iterations * TF32_SHARE if self._rounds(device) else iterations + 1,
            fixed=self._inverses * inverse_operations(columns, device),
            per_row=iterations * elementwise,
        )

    def together(self, columns: int, nodes: int) -> float:
        """See `Costs`: the inverses."""
        return self._inverses * together_operations(columns, nodes)

    def method_counts(self, rows: int, columns: int, device: str) -> SolveCounts:
        """The iterations, and the inverses, which are computed in panels."""
        iterations, inverses = self.settings.admm_iterations, self._inverses
        launches, moved = self._operator_work(rows, columns, device)
        rounded = iterations if self._rounds(device) else 0
        moved += _CENTERED_BYTES * rows * columns if rounded else 0.0
        return SolveCounts(
            products=0 if rounded else 1 + iterations,
            rounded=rounded,
            steps=1 + iterations,
            inverse=inverses * sweep_operations(columns, device),
            inverses=inverses,
            moved=24.0 * inverses * columns * columns + iterations * moved,
            operators=math.ceil(iterations * (12 + launches)) + inverses * sweep_launches(columns),
        )

    def _operator_work(self, rows: int, columns: int, device: str) -> tuple[float, float]:
        """See `operator_work`; nothing for patterns that are projected on."""
        if not _proximal(self.pattern):
            return 0.0, 0.0
        return operator_work(self.settings.kernels, rows, columns, device, _OPERATOR_STEPS)

    def counts_of_inputs(self, whole: SolveCounts, columns: int, inputs: float) -> SolveCounts:
        """As for all methods; each inverse is that of an (n, n) matrix."""
        counts = super().counts_of_inputs(whole, columns, inputs)
        one = 3.0 * inputs**2 * columns + inputs**3 / 3
        return replace(counts, inverse=self._inverses * one)

    def matrix_bytes(self, columns: float) -> float:
        """The inverse, and two panels for computing it in blocks."""
        return 4.0 * columns * columns + 8.0 * columns * min(INVERSE_PANEL, columns)

    def matrix_bytes_of_inputs(self, rows: int, columns: float, inputs: float) -> float:
        """The scaled inputs, their product with a diagonal, and the factors of two inverses."""
        factors = 16.0 * inputs * columns + 8.0 * inputs * inputs
        return 4.0 * inputs * rows + max(entry_bytes(columns, inputs), factors)

    @property
    def _inverses(self) -> int:
        return 1 if self.settings.admm_first_iterations >= self.settings.admm_iterations else 2


class _Rows:
    """The state of the iteration for some rows (R, C), which depend on no others.

    rounded: whether the products are TF32; the form is then the centered one of `stepper`.
    """

    def __init__(
        self, original: Tensor, problem: ScaledHessian, settings: SolverSettings, rounded: bool
    ) -> None:
        self.problem, self.pattern, self.rounded = problem, settings.parsed_pattern, rounded
        self.sparse, self.sizes = problem.scale_rows(original)
        linear = self.sparse.neg() if rounded else problem.multiply(self.sparse)
        dual, self.product = torch.zeros_like(self.sparse), torch.empty_like(self.sparse)
        self.right = torch.add(linear, self.sparse, alpha=1 if rounded else settings.admm_rho)
        self.step = stepper(
            *(dual, self.sparse, linear, self.pattern, settings.kernels), centered=rounded
        )

    def run(self, inverse: Inverse, schedule: Sequence[Numbers]) -> None:
        """The iterations with one inverse."""
        for numbers in schedule:
            with tf32_products(self.rounded):
                inverse.multiply(self.right, out=self.product)
            self.right, self.product = self.product, self.right
            self.step(self.right, numbers)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mask (R, C), weight (R, C), and the last change of the support, (R,)."""
        mask = keep_mask(self.pattern, self.sparse.abs())
        changed = support_change(self.sparse != 0, (self.sparse != 0) & mask, mask)
        return mask, self.problem.unscale_rows(self.sparse * mask, self.sizes), changed


def settled_penalty(inverse: Inverse, problem: ScaledHessian, rho: float) -> float:
    """The rho for the late iterations, which hardly differ from a projection: sqrt(b).

    b stands for the bulk of the spectrum of H~ (C, C): it is the b for which b I, in place of H~,
    gives `inverse` = (H~ + rho I)^-1 the same mean diagonal over live columns. The mean eigenvalue
    of H~ is 1; b is near 0.2 with noise and little regularization, above 0.5 with much. A much
    smaller rho lets the iteration jump between supports (held-out errors up to 1.6 times as
    large); a much larger rho fixes the first support.
    """
    live = problem.live.sum().clamp(min=1)
    typical = float((inverse.diagonal() * problem.live).sum() / live)
    return max(1 / typical - rho, 0.0) ** 0.5 if typical > 0 else 0.0


def stepper(
    dual: Tensor,
    sparse: Tensor,
    linear: Tensor,
    pattern: Pattern,
    gpu_kernels: GpuKernels = "triton",
    centered: bool = False,
) -> Callable[[Tensor, Numbers], None]:
    """An iteration without its matrix product, as a function of V and `Numbers`; works in place.

    All are (R, C) fp32. dual: U, scaled by the given factor on return. sparse: Z. linear: W~0 H~.
    V is the product; on return it is the next right-hand side, linear + rho (Z - U).
    centered: linear is -W~0 instead; V is then W~0 + rho times the product, and the right-hand side
    Z - U - W~0. gpu_kernels: see `prox_operator`.
    On a CPU with numba the 2:4 step is one pass over memory. There, and with kernels `torch`, the
    operator takes _OPERATOR_STEPS steps of Newton's method: the error is far below the change of an
    iteration.
    """
    proximal = _proximal(pattern)
    on_cpu = dual.device.type == "cpu" and not centered
    kernels = _numba_kernels() if proximal and on_cpu else None
    if kernels is not None and dual.numel():
        step: Callable[[Tensor, Numbers], None] = kernels.stepper_numba(
            *(matrix.numpy() for matrix in (dual, sparse, linear)),
            steps=_OPERATOR_STEPS,
        )
        return step
    projected = None if proximal else pattern
    return lambda product, numbers: advance_torch(
        product, dual, sparse, linear, numbers, projected, gpu_kernels, centered
    )


def _proximal(pattern: Pattern) -> bool:
    """Whether the operator is for this pattern; all others are projected on."""
    return (pattern.keep, pattern.group) == (2, 4)


def advance_torch(
    product: Tensor,
    dual: Tensor,
    sparse: Tensor,
    linear: Tensor,
    numbers: Numbers,
    pattern: Pattern | None = None,
    gpu_kernels: GpuKernels = "triton",
    centered: bool = False,
) -> None:
    """`stepper` without numba. pattern: to project on; None for the operator of 2:4."""
    strength, relaxation, shrink, rho = numbers
    if centered:
        product.mul_(rho * shrink).sub_(linear)  # rho * shrink: the rho of this iteration
        rho = 1.0
    dual.add_(product.mul_(relaxation).add_(sparse, alpha=1 - relaxation))
    if pattern is None:
        steps = _OPERATOR_STEPS if gpu_kernels == "torch" else None
        sparse.copy_(prox_operator(dual, strength, kernels=gpu_kernels, steps=steps))
    else:
        torch.mul(dual, keep_mask(pattern, dual.abs()), out=sparse)
    dual.sub_(sparse).mul_(shrink)
    torch.sub(sparse, dual, out=product)
    torch.add(linear, product, alpha=rho, out=product)


@cache
def _numba_kernels() -> Any:
    """The module with the CPU kernel; None where numba is not installed."""
    if find_spec("numba") is None:
        return None
    return import_module("pipeline.solvers.kernels.admm_numba")
