"""``prox``: proximal gradient with a growing lambda (Kübler et al., "A Proximal Operator for
Inducing 2:4-Sparsity", the algorithm of its section on layer-wise pruning)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.solvers.base import BaseSolver, Found, GroupData, solve_diagonal, support_change
from pipeline.solvers.prox import prox_operator
from pipeline.solvers.regularize import largest_eigenvalue
from pipeline.solvers.types import SolverSettings
from storage.errors import ConfigError

# lambda beyond which the operator keeps two of four whatever the row: entries of a row scaled to
# mean magnitude 1 that are small enough to survive it are below fp32's reach of the others.
_LAMBDA_END = 1e4
_CHECK_EVERY = 50


class ProxSolver(BaseSolver):
    """W~ <- prox_{lambda_k}(W~ - (W~ - W~0) H~ / lambda_max), lambda_k = lambda_0 beta^k.

    lambda_k contains the step size. Rows are scaled to mean magnitude 1 each. A row whose groups
    all have two zeros is final and stands still while the others go on, so no row depends on
    another; every 50 iterations the host looks whether any is left. Rows not done when lambda
    has passed 1e4 keep the two largest of each group.
    Memory beyond the Hessian: one C x C fp32, and five (R, C). Time: one product (R, C) x (C, C)
    an iteration, about 700 at beta = 1.01. With n inputs in place of the Hessian two products
    (R, C) x (C, n), and no C x C.
    """

    def __init__(self, settings: SolverSettings) -> None:
        super().__init__(settings)
        if (self.pattern.keep, self.pattern.group) != (2, 4):
            raise ConfigError(
                f"method prox is for pattern 2:4, not {self.pattern}: use prox_admm or sparsegpt"
            )

    def _derive(self, prepared: GroupData) -> GroupData:
        assert prepared.problem is not None
        few = prepared.problem.statistics.inputs is not None
        matrix = None if few else prepared.problem.write()
        return replace(prepared, matrix=matrix, eigenvalue=largest_eigenvalue(prepared.problem))

    def _find(self, original: Tensor, prepared: GroupData) -> Found:
        problem, matrix = prepared.problem, prepared.matrix
        assert problem is not None
        if problem.shrinkage == 1:
            return solve_diagonal(original, problem, self.pattern)
        target, sizes = problem.enter(original)
        rate = 1 / prepared.eigenvalue
        growth = self.settings.prox_growth
        limit = math.ceil(math.log(_LAMBDA_END / self.settings.prox_lambda) / math.log(growth))
        rows, strength, iterations = target, self.settings.prox_lambda, 0
        done = _two_of_four(rows)
        for iterations in range(1, limit + 1):
            away = rows - target
            slope = problem.multiply(away) if matrix is None else away @ matrix
            descended = rows - slope.mul_(rate)
            rows = torch.where(done, rows, prox_operator(descended, strength))
            done |= _two_of_four(rows)
            strength *= growth
            if iterations % _CHECK_EVERY == 0 and bool(done.all()):
                break
        mask = self.pattern.keep_mask(rows.abs())
        changed = support_change(rows != 0, (rows != 0) & mask, mask)
        weight = problem.leave(rows * mask, sizes)
        return Found(weight, mask, iterations, changed)


def _two_of_four(rows: Tensor) -> Tensor:
    """(R, C) -> (R, 1) bool: at most two of every four are non-zero in the whole row."""
    used = (rows != 0).view(rows.shape[0], -1, 4).sum(dim=2, dtype=torch.int8)
    return (used <= 2).all(dim=1, keepdim=True)
