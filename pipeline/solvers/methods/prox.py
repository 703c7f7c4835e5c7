"""`prox`: proximal gradient with a growing lambda (Kübler et al., "A Proximal Operator for
Inducing 2:4-Sparsity", the algorithm of its section on layer-wise pruning)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.config.solver import GpuProducts, SolverSettings
from pipeline.runtime.device import tf32_products
from pipeline.solvers.base import (
    BaseSolver,
    GroupData,
    MethodResult,
    solve_diagonal,
    support_change,
)
from pipeline.solvers.cost import (
    OPERATIONS_PER_BYTE,
    MethodCost,
    SolveCounts,
    elementwise_operations,
)
from pipeline.solvers.hessian import ScaledHessian
from pipeline.solvers.kernels.prox_operator import operator_work, prox_operator
from pipeline.solvers.masks import keep_mask
from storage.errors import ConfigError

HELP = "proximal gradient with a growing regularizer that is zero on 2:4 groups"
DEFAULTS = {"damping": 0.01, "shrinkage": 0.0, "refine": "cg"}

# The largest lambda. Above it the operator keeps two of four in any row of mean magnitude 1: a
# third entry small enough to survive would be below fp32's resolution of the others.
_LAMBDA_END = 1e4
_CHECK_EVERY = 50
# Iterations until every group is 2:4, at the default schedule.
_TYPICAL_ITERATIONS = 700
# Share of the schedule after which every row is 2:4, measured on real layers.
_TYPICAL_SHARE = 0.45
_POWER_STEPS = 64  # to estimate the largest eigenvalue


class ProxSolver(BaseSolver):
    """W~ <- prox_{lambda_k}(W~ - (W~ - W~0) H~ / lambda_max), lambda_k = lambda_0 beta^k.

    lambda_k contains the step size. Each row is scaled to mean magnitude 1. A row that is 2:4 is
    final and no longer updated, so no row depends on another. Every 50 iterations the host checks
    whether all rows are final. When lambda exceeds 1e4, the remaining rows keep the two largest
    entries of each group.
    Memory beyond the Hessian: one C x C and five (R, C), fp32. Time: one product (R, C) x (C, C)
    per iteration, about 700 iterations at beta = 1.01. With n inputs in place of the Hessian: two
    products (R, C) x (C, n) per iteration, and no C x C.
    """

    joint = True
    compiles = True
    rows_held = 7
    method_settings = ("prox_lambda", "prox_growth", "kernels")
    unsettled_advice = (
        "A --prox-growth closer to 1 lets the mask settle before it is fixed; it takes longer."
    )

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
        return replace(prepared, matrix=matrix, eigenvalue=prepared.problem.largest_eigenvalue)

    def _find(self, original: Tensor, prepared: GroupData) -> MethodResult:
        problem, matrix = prepared.problem, prepared.matrix
        assert problem is not None
        if problem.shrinkage == 1:
            return solve_diagonal(original, problem, self.pattern)
        target, sizes = problem.scale_rows(original)
        rate, rounded = 1 / prepared.eigenvalue, self._rounds(original.device.type)
        growth = self.settings.prox_growth
        limit = math.ceil(self._schedule())
        rows, strength, iterations = target, self.settings.prox_lambda, 0
        done = _two_of_four(rows)
        for iterations in range(1, limit + 1):
            change = rows - target
            gradient = gradient_of(change, problem, matrix, rounded)
            descended = rows - gradient.mul_(rate)
            pruned = prox_operator(descended, strength, kernels=self.settings.kernels)
            rows = torch.where(done, rows, pruned)
            done |= _two_of_four(rows)
            strength *= growth
            if iterations % _CHECK_EVERY == 0 and bool(done.all()):
                break
        mask = keep_mask(self.pattern, rows.abs())
        changed = support_change(rows != 0, (rows != 0) & mask, mask)
        weight = problem.unscale_rows(rows * mask, sizes)
        products: GpuProducts = "tf32" if rounded and matrix is not None else "float32"
        return MethodResult(weight, mask, iterations, changed, products=products)

    def _rounds(self, device: str) -> bool:
        """Whether the iterations' products are TF32 on a device, by its torch type."""
        return device == "cuda" and self.settings.gpu_products == "tf32"

    def _schedule(self) -> float:
        """Iterations until lambda reaches its largest value."""
        start, growth = self.settings.prox_lambda, self.settings.prox_growth
        return math.log(_LAMBDA_END / start) / math.log(growth)

    def method_cost(self, columns: int, device: str) -> MethodCost:
        """One product and one application of the operator per iteration."""
        _, moved = operator_work(self.settings.kernels, 1, columns, device)
        elementwise = elementwise_operations(columns, device) + OPERATIONS_PER_BYTE * moved
        return MethodCost(_TYPICAL_ITERATIONS, per_row=_TYPICAL_ITERATIONS * elementwise)

    def method_counts(self, rows: int, columns: int, device: str) -> SolveCounts:
        """The iterations, and the power method for the step size."""
        iterations = math.ceil(_TYPICAL_SHARE * self._schedule())
        launches, moved = operator_work(self.settings.kernels, rows, columns, device)
        return SolveCounts(
            products=iterations,
            steps=iterations,
            moved=(24.0 + 4.0 * _POWER_STEPS) * columns * columns + iterations * moved,
            operators=math.ceil(iterations * (12 + launches)),
        )

    def counts_of_inputs(self, whole: SolveCounts, columns: int, inputs: float) -> SolveCounts:
        """As for all methods; the power method, too, multiplies by the inputs."""
        counts = super().counts_of_inputs(whole, columns, inputs)
        saved = 4.0 * _POWER_STEPS * columns**2 * (1 - 2 * inputs / columns)
        return replace(counts, moved=whole.moved - saved)

    def matrix_bytes(self, columns: float) -> float:
        """The scaled Hessian."""
        return 4.0 * columns * columns


def gradient_of(
    change: Tensor, problem: ScaledHessian, matrix: Tensor | None, rounded: bool
) -> Tensor:
    """change (R, C) times H~, which is `matrix` where it was formed; rounded: in TF32 on a GPU."""
    if matrix is None:
        return problem.multiply(change)
    with tf32_products(rounded):
        return change @ matrix


def _two_of_four(rows: Tensor) -> Tensor:
    """(R, C) -> (R, 1) bool: whether every group of four has at most two non-zero entries."""
    used = (rows != 0).view(rows.shape[0], -1, 4).sum(dim=2, dtype=torch.int8)
    return (used <= 2).all(dim=1, keepdim=True)
