"""``prox_admm``, the default: the proximal operator inside ADMM, the quadratic solved exactly.

    V <- (W~0 H~ + rho (Z - U)) (H~ + rho I)^-1
    W <- r V + (1 - r) Z              (over-relaxation r)
    Z <- prox_lambda(W + U)           (2:4; other patterns: projection on the pattern)
    U <- U + W - Z

The inverse is explicit and held while lambda (which contains 1/rho) grows at every iteration. It
is taken twice: at a weak penalty that lets supports move, and then at the one that the spectrum of
H~ asks for (`settled_penalty`), where U shrinks as rho grows. After a fixed number of iterations
the two largest of four are kept. Both inverses serve all rows of all layers of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pipeline.config.pattern import Pattern
from pipeline.solvers.base import BaseSolver, Found, GroupData, solve_diagonal, support_change
from pipeline.solvers.cost import (
    INVERSE_PANEL,
    INVERSE_SLOWDOWN,
    OPERATIONS_PER_ENTRY,
    MethodCost,
    SolveCounts,
    entry_bytes,
)
from pipeline.solvers.hessian import ScaledHessian, raise_damping
from pipeline.solvers.inverse import Inverse, inverse_of
from pipeline.solvers.kernels.prox_operator import prox_operator
from pipeline.solvers.masks import keep_mask

HELP = "the proximal operator inside ADMM, which solves the quadratic exactly"
# ADMM ends near the minimizer on its support: twice as many steps lower the error by at most 0.2 %.
DEFAULTS = {"damping": 0.001, "shrinkage": "estimate", "refine": "cg", "refine_steps": 6}

# lambda, relaxation, the factor on U, and the next iteration's rho.
Numbers = tuple[float, float, float, float]
_OPERATOR_STEPS = 2


class ProxAdmmSolver(BaseSolver):
    """ADMM with the proximal operator in the coordinates where H~ has a unit diagonal.

    Memory beyond the Hessian: one C x C fp32 for the inverse (where blocks make it, two C x 512
    panels beside it), and about nine (R, C) fp32 of the rows.
    Time: one product (R, C) x (C, C) an iteration, two at the start, one a refinement step, about
    three for the report, and 2 C^3 operations for each of two inverses. With n inputs in place of
    the Hessian two products (R, C) x (C, n) an iteration, and no C x C.
    """

    joint = True
    compiles = True
    rows_held = 9
    own_settings = (
        "admm_iterations",
        "admm_first_iterations",
        "admm_rho",
        "admm_rho_factor",
        "admm_lambda",
        "admm_lambda_growth",
        "admm_relaxation",
    )

    def _find(self, original: Tensor, prepared: GroupData) -> Found:
        problem = prepared.problem
        assert problem is not None
        if problem.shrinkage == 1:
            return solve_diagonal(original, problem, self.pattern)
        held = problem.statistics.inputs is None
        buffer = torch.empty_like(problem.hessian) if held else None
        while True:
            found = self._iterate(original, problem, buffer)
            if found is not None:
                return found
            problem = raise_damping(problem)

    def _iterate(
        self, original: Tensor, problem: ScaledHessian, buffer: Tensor | None
    ) -> Found | None:
        """The whole loop, or None where H~ + rho I was not positive definite."""
        settings = self.settings
        sparse, sizes = problem.enter(original)
        linear = problem.multiply(sparse)
        dual, product = torch.zeros_like(sparse), torch.empty_like(sparse)
        rho, strength = settings.admm_rho, settings.admm_lambda
        inverse = inverse_of(problem, rho, buffer)
        if inverse is None:
            return None
        settled = settings.admm_rho_factor * settled_penalty(inverse, problem, rho)
        right = torch.add(linear, sparse, alpha=rho)
        step = stepper(dual, sparse, linear, self.pattern)
        for iteration in range(1, settings.admm_iterations + 1):
            inverse.multiply(right, out=product)
            right, product = product, right
            switch = iteration == settings.admm_first_iterations != settings.admm_iterations
            shrink = rho / max(settled, rho) if switch else 1.0
            rho /= shrink
            numbers = (strength, settings.admm_relaxation, shrink, rho)
            step(right, numbers)
            strength *= settings.admm_lambda_growth
            if shrink < 1:
                inverse = inverse_of(problem, rho, buffer)
                if inverse is None:
                    return None
        mask = keep_mask(self.pattern, sparse.abs())
        changed = support_change(sparse != 0, (sparse != 0) & mask, mask)
        weight = problem.leave(sparse * mask, sizes)
        return Found(weight, mask, settings.admm_iterations, changed, problem=problem)

    def method_cost(self, columns: int) -> MethodCost:
        """A product and the operator in each iteration, and two inverses."""
        iterations = self.settings.admm_iterations
        return MethodCost(
            products=iterations + 1,
            fixed=4.0 * columns**3 * INVERSE_SLOWDOWN,
            per_row=iterations * OPERATIONS_PER_ENTRY * columns,
        )

    def method_counts(self, rows: int, columns: int, device: str) -> SolveCounts:
        """Iterations, and inverses that are made in panels."""
        iterations, inverses = self.settings.admm_iterations, self._inverses
        return SolveCounts(
            products=1 + iterations,
            steps=1 + iterations,
            inverse=2.0 * inverses * float(columns) ** 3,
            moved=24.0 * inverses * columns * columns,
            operators=12 * iterations + inverses * 12 * -(-columns // INVERSE_PANEL),
        )

    def counts_of_inputs(self, whole: SolveCounts, columns: int, inputs: float) -> SolveCounts:
        """Each inverse is one of (n, n)."""
        counts = super().counts_of_inputs(whole, columns, inputs)
        one = 3.0 * inputs**2 * columns + inputs**3 / 3
        return replace(counts, inverse=self._inverses * one)

    def matrix_bytes(self, columns: float) -> float:
        """The inverse, and two panels where it is made in blocks."""
        return 4.0 * columns * columns + 8.0 * columns * min(INVERSE_PANEL, columns)

    def matrix_bytes_of_inputs(self, rows: int, columns: float, inputs: float) -> float:
        """Inputs scaled, and once more times a diagonal; a factor of an inverse, and the one
        before."""
        factors = 16.0 * inputs * columns + 8.0 * inputs * inputs
        return 4.0 * inputs * rows + max(entry_bytes(columns, inputs), factors)

    @property
    def _inverses(self) -> int:
        return 1 if self.settings.admm_first_iterations >= self.settings.admm_iterations else 2


def settled_penalty(inverse: Inverse, problem: ScaledHessian, rho: float) -> float:
    """The rho at which a late iteration, all but a projection on the pattern, settles: sqrt(b).

    b, the bulk of the spectrum of H~ (C, C), is what H~ would be as a multiple of the identity if
    ``inverse``, (H~ + rho I)^-1, is to have the same mean diagonal over live columns; the mean
    eigenvalue is 1. With noise and little regularization b is near 0.2, with much above 0.5. A
    rho well below it leaves the iteration jumping between supports (held-out errors up to 1.6
    times as large), one far above it commits to the first support met.
    """
    live = problem.live.sum().clamp(min=1)
    typical = float((inverse.diagonal() * problem.live).sum() / live)
    return max(1 / typical - rho, 0.0) ** 0.5 if typical > 0 else 0.0


def stepper(
    dual: Tensor, sparse: Tensor, linear: Tensor, pattern: Pattern
) -> Callable[[Tensor, Numbers], None]:
    """All of an iteration but its product, in place, on (R, C) fp32: a function of V and numbers.

    dual: U, shrunk by the given factor on return. sparse: Z. linear: W~0 H~.
    V, the product, is on return the next iteration's right-hand side linear + rho (Z - U).
    On a CPU with numba 2:4 is one pass over memory, in which the operator's root is found by
    _OPERATOR_STEPS of Newton's method: what that leaves is far below what an iteration moves.
    """
    proximal = (pattern.keep, pattern.group) == (2, 4)
    kernels = _numba_kernels() if proximal and dual.device.type == "cpu" else None
    if kernels is not None and dual.numel():
        step: Callable[[Tensor, Numbers], None] = kernels.stepper_numba(
            *(matrix.numpy() for matrix in (dual, sparse, linear)),
            steps=_OPERATOR_STEPS,
            threads=torch.get_num_threads(),
        )
        return step
    projected = None if proximal else pattern
    return lambda product, numbers: advance_torch(product, dual, sparse, linear, numbers, projected)


def advance_torch(
    product: Tensor,
    dual: Tensor,
    sparse: Tensor,
    linear: Tensor,
    numbers: Numbers,
    pattern: Pattern | None = None,
) -> None:
    """`stepper` in plain torch operations; without a pattern, 2:4 by the proximal operator."""
    strength, relaxation, shrink, rho = numbers
    dual.add_(product.mul_(relaxation).add_(sparse, alpha=1 - relaxation))
    if pattern is None:
        sparse.copy_(prox_operator(dual, strength))
    else:
        torch.mul(dual, keep_mask(pattern, dual.abs()), out=sparse)
    dual.sub_(sparse).mul_(shrink)
    torch.sub(sparse, dual, out=product)
    torch.add(linear, product, alpha=rho, out=product)


@cache
def _numba_kernels() -> Any:
    """The module of the CPU kernel, None where numba is not installed."""
    if find_spec("numba") is None:
        return None
    return import_module("pipeline.solvers.kernels.admm_numba")
