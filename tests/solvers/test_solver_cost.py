"""What a solve costs on a GPU where rows hardly matter: the kernels that it starts."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.solver import GpuKernels, SolverSettings
from pipeline.solvers.kernels.cholesky import factor_launches, narrow_, upper_factor_
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
        matrix = torch.eye(columns, dtype=torch.float64)
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


@pytest.mark.parametrize("blocksize", [128, 100, 1000, "auto"])
def test_wider_lazy_blocks_start_no_fewer_kernels(blocksize: int | str) -> None:
    """A lazy block that is too wide for one call of the kernel is several calls."""
    solver = solver_for(SolverSettings(method="sparsegpt", blocksize=blocksize))
    counts = solver.method_counts(16, 4096, "cuda")
    least = factor_launches(4096) + 4096 / 256 * 2
    assert least < counts.operators < factor_launches(4096) + 4096 / 100 * 4 + 4096 * 0.05 + 8
