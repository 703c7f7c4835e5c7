"""What a solve costs on a GPU where rows hardly matter: the kernels that it starts."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from pipeline.config.solver import GpuKernels, GpuProducts, SolverSettings
from pipeline.planning.counts import solve_counts
from pipeline.solvers.kernels.cholesky import factor_launches, narrow_, upper_factor_
from pipeline.solvers.kernels.prox_operator import operator_work, prox_operator
from pipeline.solvers.registry import solve_cost, solver_for
from tests.support.launches import Launches

LAUNCH = 5e-6  # seconds
PRODUCTS = 50e12  # operations per second
WIDE = 28_672


def settings(pattern: str, kernels: GpuKernels) -> SolverSettings:
    return SolverSettings(method="sparsegpt", pattern=pattern, kernels=kernels)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:2", "16:32", "unstructured:0.5"])
def test_the_loop_starts_as_many_kernels_as_the_model_says(pattern: str) -> None:
    columns, blocks = 512, 4
    solver = solver_for(settings(pattern, "torch"))
    weight = torch.randn(16, columns, generator=torch.Generator().manual_seed(0))
    hessian = torch.eye(columns, dtype=torch.float64)
    with Launches() as started:
        upper_factor_(hessian)
        upper = narrow_(hessian)
        mask = torch.zeros_like(weight, dtype=torch.bool)
        for left in range(0, columns, columns // blocks):
            block = slice(left, left + columns // blocks)
            errors = solver._solve_block(weight, mask, upper, block)  # type: ignore[attr-defined]
            weight[:, block.stop :].addmm_(errors, upper[block, block.stop :], alpha=-1)
    modelled = solver.method_counts(16, columns, "cuda").operators
    assert modelled == pytest.approx(started.total, rel=0.1)


def test_the_factor_starts_as_many_kernels_as_the_model_says() -> None:
    for columns in (256, 1000, 2048):
        matrix = torch.empty(columns, columns, dtype=torch.float64, device="meta")
        with Launches() as started:
            upper_factor_(matrix)
            narrow_(matrix)
        assert factor_launches(columns) == pytest.approx(started.total, rel=0.1)


def test_a_gpus_fixed_cost_is_the_time_of_its_launches() -> None:
    """At C = 28,672 the loop takes 2.7 s whatever the rows, as counted; the kernel a fiftieth."""
    factor = 1.4 * WIDE**3
    loop, kernel = (
        (solve_cost(settings("2:4", kernels), WIDE, "cuda").fixed - factor) / PRODUCTS
        for kernels in ("torch", "triton")
    )
    assert loop == pytest.approx(15.6 * WIDE * LAUNCH, rel=0.15)
    assert kernel < loop / 25
    # On a CPU nothing has changed.
    assert solve_cost(settings("2:4", "triton"), WIDE, "cpu").fixed == 4.0 * WIDE**3 + 8e6 * WIDE


def test_products_of_iterations_are_tf32_on_a_gpu_alone() -> None:
    rounded, plain = (
        solver_for(SolverSettings(method="prox_admm", gpu_products=each))
        for each in get_args(GpuProducts)
    )
    iterations = rounded.settings.admm_iterations
    on_gpu, before = (each.method_counts(1024, 8192, "cuda") for each in (rounded, plain))
    # The centered form needs no product of the weights themselves.
    assert (on_gpu.products, on_gpu.rounded) == (0, iterations)
    assert (before.products, before.rounded) == (1 + iterations, 0)
    one = 2.0 * 8192**2
    saved = plain.cost(8192, "cuda").per_row - rounded.cost(8192, "cuda").per_row
    assert saved == pytest.approx(one * (1 + iterations * (1 - 50 / 412)))
    whole = solve_counts(SolverSettings(), 1024, 8192, 2, "cuda")
    assert (whole.products, whole.rounded) == (7, iterations)
    few = solve_counts(SolverSettings(), 1024, 8192, 2, "cuda", inputs=1024.0)
    assert few.rounded == iterations * 2 / 8


def test_a_cpus_costs_are_those_that_rows_were_always_dealt_by() -> None:
    """Other costs would be other row slices, and so other bytes in a resumed run."""
    cost = solve_cost(SolverSettings(), 4096, "cpu")
    assert cost.fixed == 4.0 * 4096**3 * 1.2
    assert cost.per_row == (60 + 1 + 7 + 3) * 2.0 * 4096**2 + 60 * 500.0 * 4096
    assert solve_counts(SolverSettings(), 64, 4096, 4, "cpu").rounded == 0


def test_a_gpus_inverses_take_their_time() -> None:
    """Two of C = 28,672 at 37 TFLOP/s, in units of products at 50 TFLOP/s."""
    seconds = solve_cost(SolverSettings(), WIDE, "cuda").fixed / PRODUCTS
    assert seconds == pytest.approx(2 * WIDE**3 / 37e12, rel=0.05)


@pytest.mark.parametrize("blocksize", [128, 100, 1000, "auto"])
def test_wider_lazy_blocks_start_no_fewer_kernels(blocksize: int | str) -> None:
    """A lazy block that is too wide for one call of the kernel is several calls."""
    solver = solver_for(SolverSettings(method="sparsegpt", blocksize=blocksize))
    counts = solver.method_counts(16, 4096, "cuda")
    least = factor_launches(4096) + 4096 / 256 * 2
    assert least < counts.operators < factor_launches(4096) + 4096 / 100 * 4 + 4096 * 0.05 + 8


@pytest.mark.parametrize("steps", [2, 10])
def test_the_operator_starts_as_many_kernels_as_the_model_says(steps: int) -> None:
    """In plain torch operations: a number for each 2^20 groups, whatever their values."""
    for rows, pieces in ((16, 1), (2048, 4)):
        weight = torch.empty(rows, 8192, device="meta")
        with Launches() as started:
            prox_operator(weight, 0.1, kernels="torch", steps=steps)
        launches, _ = operator_work("torch", rows, 8192, "cuda", steps)
        assert launches == pytest.approx(started.total, rel=0.05)
        assert started.total < pieces * 450
    assert operator_work("triton", 16, 8192, "cuda") == (0, 0)


@pytest.mark.parametrize("method", ["prox", "prox_admm"])
def test_plain_torch_operations_are_counted(method: str) -> None:
    """Where the user chose them: more kernels and more bytes, on a GPU only."""
    triton, plain = (
        solver_for(SolverSettings(method=method, kernels=kernels))
        for kernels in get_args(GpuKernels)
    )
    before, after = (each.method_counts(1024, 4096, "cuda") for each in (triton, plain))
    assert after.operators > 10 * before.operators
    assert after.moved > before.moved
    assert plain.cost(4096, "cuda").per_row > triton.cost(4096, "cuda").per_row
    assert triton.method_counts(64, 64, "cpu") == plain.method_counts(64, 64, "cpu")
    assert triton.cost(64, "cpu") == plain.cost(64, "cpu")
