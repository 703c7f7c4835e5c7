"""What a solve costs, from shapes and settings alone: for dealing rows to workers and for plans."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.solvers.types import SolverSettings

# Iterations of `prox` until at most two of four are left, at its default schedule (method.md).
_PROX_ITERATIONS = 700
# Time of the elementwise work of an iteration on one entry, in operations at the speed of a
# product, and of one inverse above the 2 C^3 operations that it needs: measured on a CPU
# (benchmarks/scaling.py). A GPU's are of another size, but are small beside products there.
_OPERATIONS_PER_ENTRY = 500.0
_INVERSE_SLOWDOWN = 1.2
# SparseGPT goes through the columns one by one: its time is mostly that of starting so many small
# operations, whatever the rows. In the same unit, per column.
_OPERATIONS_PER_COLUMN = 8e6


@dataclass(frozen=True)
class SolveCost:
    """Operations, at the speed of a matrix product, of solving one group of layers on one worker.

    fixed: paid by each worker that solves any of the group's rows (factorizations). per_row: for
    each row. products: how many products (R, C) x (C, C) are among them.
    """

    fixed: float
    per_row: float
    products: int

    def of(self, rows: int) -> float:
        """Operations for `rows` rows; 0 for none."""
        return self.fixed + rows * self.per_row if rows else 0.0


def solve_cost(settings: SolverSettings, columns: int) -> SolveCost:
    """The cost for layers with `columns` inputs. Deterministic: every worker must agree on it."""
    settings = settings.resolved()
    cube, square = 2.0 * columns**3, 2.0 * columns**2
    # Refinement: one product a step, one for its start. Objectives: at zero, before, after.
    refined = settings.refine != "none"
    products = (settings.refine_steps or 0) + 1 if refined else 0
    fixed, elementwise = 0.0, 0.0
    products += 1 if settings.method in ("magnitude", "wanda") and not refined else 3
    if settings.method == "prox_admm":
        products += settings.admm_iterations + 1
        fixed = 2 * cube * _INVERSE_SLOWDOWN
        elementwise = settings.admm_iterations * _OPERATIONS_PER_ENTRY * columns
    elif settings.method == "prox":
        products += _PROX_ITERATIONS
        elementwise = _PROX_ITERATIONS * _OPERATIONS_PER_ENTRY * columns
    elif settings.method == "sparsegpt":
        products += 1
        fixed = 2 * cube + _OPERATIONS_PER_COLUMN * columns
    return SolveCost(fixed, products * square + elementwise, products)
