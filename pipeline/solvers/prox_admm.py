"""``prox_admm``, the default: the proximal operator inside ADMM, the quadratic solved exactly.

    W <- (W~0 H~ + rho (Z - U)) (H~ + rho I)^-1
    Z <- prox_lambda(W + U)           (2:4; other patterns: projection on the pattern)
    U <- U + W - Z

The inverse is explicit and held for a stage of iterations, while lambda (which contains 1/rho)
grows at every one; at the next stage rho grows and U shrinks by the same factor. After a fixed
number of iterations the two largest of four are kept. One inverse a stage serves all rows of
all layers of the group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.solvers.base import BaseSolver, Found, GroupData, solve_diagonal, support_change
from pipeline.solvers.factor import invert_
from pipeline.solvers.prox import prox_operator
from pipeline.solvers.regularize import ScaledHessian, raise_damping


class ProxAdmmSolver(BaseSolver):
    """ADMM with the proximal operator in the coordinates where H~ has a unit diagonal.

    Memory beyond the Hessian: one C x C fp32 for the stage's inverse, two C x 512 panels while
    inverting, and about eight (R, C) fp32 of the rows.
    Time: one product (R, C) x (C, C) an iteration, one at the start, one a refinement step, and
    2 C^3 operations a stage.
    """

    def _find(self, original: Tensor, prepared: GroupData) -> Found:
        problem = prepared.problem
        assert problem is not None
        if problem.shrinkage == 1:
            return solve_diagonal(original, problem, self.pattern)
        buffer = torch.empty_like(problem.hessian)
        while True:
            found = self._iterate(original, problem, buffer)
            if found is not None:
                return found
            problem = raise_damping(problem)

    def _iterate(self, original: Tensor, problem: ScaledHessian, buffer: Tensor) -> Found | None:
        """The whole loop, or None where H~ + rho I was not positive definite."""
        settings = self.settings
        target, sizes = problem.enter(original)
        linear = problem.multiply(target)
        sparse, dual = target, torch.zeros_like(target)
        rho, strength = settings.admm_rho, settings.admm_lambda
        proximal = (self.pattern.keep, self.pattern.group) == (2, 4)
        for stage in range(settings.admm_stages):
            if stage:
                rho *= settings.admm_rho_growth
                dual /= settings.admm_rho_growth
            problem.write(rho, buffer)
            if not bool(invert_(buffer)):
                return None
            for _ in range(settings.admm_iterations):
                dense = torch.add(linear, sparse - dual, alpha=rho) @ buffer
                dual += dense
                if proximal:
                    sparse = prox_operator(dual, strength)
                    strength *= settings.admm_lambda_growth
                else:
                    sparse = dual * self.pattern.keep_mask(dual.abs())
                dual -= sparse
        mask = self.pattern.keep_mask(sparse.abs())
        changed = support_change(sparse != 0, (sparse != 0) & mask, mask)
        weight = problem.leave(sparse * mask, sizes)
        iterations = settings.admm_stages * settings.admm_iterations
        return Found(weight, mask, iterations, changed, problem=problem)
