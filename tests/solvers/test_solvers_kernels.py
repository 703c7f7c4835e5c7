"""The fast paths of prox_admm give what the plain ones give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.config.pattern import Pattern
from pipeline.config.solver import GpuKernels, SolverSettings
from pipeline.runtime.threads import set_threads
from pipeline.solvers.kernels import cholesky, on_gpu, prox_operator
from pipeline.solvers.methods import prox_admm, sparsegpt
from pipeline.solvers.registry import solver_for
from storage.errors import ConfigError, ResourceError
from tests.planning.test_plan_counts import counting
from tests.support.launches import Launches
from tests.support.solver_cases import layer, statistics_of

PATTERN = Pattern.parse("2:4")


@pytest.mark.parametrize("columns", [4, 1028, 2056])
@pytest.mark.parametrize("numbers", [(0.05, 1.6, 1.0, 0.2), (0.6, 1.0, 0.3, 0.7), (9.0, 1.6, 1, 2)])
def test_one_pass_is_the_torch_iteration(
    columns: int, numbers: tuple[float, float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("pipeline.solvers.kernels.admm_numba", exc_type=ImportError)
    calls = []
    run = kernels.stepper_numba
    monkeypatch.setattr(
        kernels, "stepper_numba", lambda *args, **kw: calls.append(1) or run(*args, **kw)
    )
    generator = torch.Generator().manual_seed(columns)
    state = [torch.randn(33, columns, generator=generator) for _ in range(4)]
    expected = [matrix.clone() for matrix in state]
    quick = [matrix.clone() for matrix in state]
    prox_admm.stepper(*quick[1:], PATTERN)(quick[0], numbers)
    monkeypatch.setattr(prox_admm, "_OPERATOR_STEPS", 10)
    prox_admm.stepper(*state[1:], PATTERN)(state[0], numbers)
    prox_admm.advance_torch(*expected, numbers)
    assert calls
    # Newton's method stops at a tolerance, and two candidates may all but tie.
    for got, wanted in zip(state, expected, strict=True):
        assert torch.isclose(got, wanted, rtol=1e-3, atol=1e-3).float().mean() > 0.9999
    assert ((state[2] == 0) == (expected[2] == 0)).float().mean() > 0.9999
    # Two steps leave the operator's root within a few thousandths of a weight's size, which is 1.
    assert (quick[2] - expected[2]).abs().mean() < 3e-3
    assert ((quick[2] == 0) == (expected[2] == 0)).float().mean() > 0.99


def test_one_pass_does_not_depend_on_threads_or_rows() -> None:
    kernels = pytest.importorskip("pipeline.solvers.kernels.admm_numba", exc_type=ImportError)
    generator = torch.Generator().manual_seed(3)
    rows = 4 * kernels.PIECE  # enough groups for three threads
    state = [torch.randn(rows, 1028, generator=generator) for _ in range(4)]
    numbers = (0.3, 1.6, 0.5, 0.9)
    split = [matrix.clone() for matrix in state]
    for part in torch.arange(rows).tensor_split(3):
        product, *held = (matrix[part[0] : part[-1] + 1] for matrix in split)
        kernels.stepper_numba(*(m.numpy() for m in held), steps=2)(product, numbers)
    product, *held = state
    try:
        set_threads(3)
        kernels.stepper_numba(*(m.numpy() for m in held), steps=2)(product, numbers)
    finally:
        set_threads(1)
    for got, wanted in zip(split, state, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("method", ["prox", "prox_admm"])
def test_plain_torch_operations_give_the_same_solution(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU computes with kernels `torch`, here on a CPU without numba."""
    weight, inputs = layer(rows=32, columns=128, tokens=400)
    statistics = statistics_of(inputs)
    settings = SolverSettings(method=method, kernels="torch", prox_growth=1.05)
    solver = solver_for(settings)
    usual = solver.solve(weight, solver.prepare(statistics))
    for module in (prox_admm, prox_operator):
        monkeypatch.setattr(module, "_numba_kernels", lambda: None)
    plain = solver.solve(weight, solver.prepare(statistics))
    assert ((usual.weight != 0) == (plain.weight != 0)).double().mean() > 0.98
    assert plain.report.objective == pytest.approx(usual.report.objective, rel=0.01)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("kept", [False, True])
def test_the_form_for_rounded_products_is_the_same_iteration(
    pattern: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unrounded, as here, it has the same solution, also where rho changes."""
    weight, inputs = layer(rows=32, columns=128, tokens=50 if kept else 400)
    statistics = statistics_of(inputs)
    if kept:
        rows = inputs.reshape(-1, 128)
        statistics = replace(statistics, hessian=None, inputs=rows)
    monkeypatch.setattr(prox_admm, "_numba_kernels", lambda: None)
    solver = solver_for(SolverSettings(pattern=pattern))
    plain = solver.solve(weight, solver.prepare(statistics))
    monkeypatch.setattr(prox_admm.ProxAdmmSolver, "_rounds", lambda *_: True)
    centered = solver.solve(weight, solver.prepare(statistics))
    assert ((plain.weight != 0) == (centered.weight != 0)).double().mean() > 0.999
    assert centered.report.objective == pytest.approx(plain.report.objective, rel=1e-3)
    assert (plain.report.products, centered.report.products) == ("float32", "tf32")


def test_a_missing_triton_is_an_error_not_another_path(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu.triton_module.cache_clear()
    monkeypatch.setattr(on_gpu, "find_spec", lambda name: None)
    for kernels in (prox_operator._triton_kernels, sparsegpt._triton_kernels):
        with pytest.raises(ResourceError, match="Triton is not installed.*or use --kernels"):
            kernels()


def test_kernels_that_are_not_known_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown kernels 'cuda': choose one of triton, torch"):
        SolverSettings(kernels="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [1, 64, 128, 700])
def test_the_inverse_is_exact_symmetric_and_in_place(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    matrix = inputs.T @ inputs / len(inputs) + 0.1 * torch.eye(columns)
    exact = torch.linalg.inv(matrix.double())
    address = matrix.data_ptr()
    matrix += torch.triu(torch.full_like(matrix, torch.nan), 1)  # the lower triangle is enough
    assert cholesky.invert_(matrix)
    assert matrix.data_ptr() == address
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [512, 1100, 2100])
def test_the_sweep_of_the_lower_triangle_is_as_accurate_as_that_of_the_whole(columns: int) -> None:
    """Against float64, with a spectrum that falls: the whole matrix swept, as the formula says."""
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(columns, columns, generator=generator)
    inputs *= torch.arange(1, columns + 1)[:, None].rsqrt()
    matrix = inputs.T @ inputs
    scale = matrix.diagonal().rsqrt()
    matrix = matrix * scale * scale[:, None]
    matrix.diagonal().fill_(1.2)
    exact = torch.linalg.inv(matrix.double())
    lower, whole = matrix.clone(), matrix.clone()
    with counting() as counter:
        assert cholesky.invert_blocks_(lower)
    with Launches() as started:
        cholesky.invert_(torch.empty(columns, columns, device="meta"))
    for left in range(0, columns, 512):
        block = slice(left, left + 512)
        pivot = torch.cholesky_inverse(torch.linalg.cholesky(whole[block, block]))
        column = whole[:, block].clone()
        column[block] = 0
        scaled = column @ pivot
        whole -= scaled @ column.T
        whole[:, block], whole[block, :], whole[block, block] = scaled, scaled.T, -pivot
    one, other = ((each - exact).norm() / exact.norm() for each in (lower, -whole))
    assert one < 1.1 * other
    assert one < 1e-4
    assert torch.equal(lower, lower.T)
    assert counter.get_total_flops() == cholesky.sweep_operations(columns, "cuda")
    assert cholesky.sweep_launches(columns) == started.total


def test_the_sweep_takes_little_more_than_c_cubed() -> None:
    for columns, most in ((8192, 1.26), (28_672, 1.08)):
        assert 1 < cholesky.sweep_operations(columns, "cuda") / columns**3 < most


def test_the_sweep_reads_the_lower_triangle_alone() -> None:
    matrix = torch.eye(1500) * 2 + 0.001
    broken = matrix + torch.triu(torch.full_like(matrix, torch.nan), 1)
    assert cholesky.invert_blocks_(matrix)
    assert cholesky.invert_blocks_(broken)
    assert torch.equal(broken, matrix)


@pytest.mark.parametrize("columns", [4, 300])
@pytest.mark.parametrize("invert", [cholesky.invert_, cholesky.invert_blocks_])
def test_an_indefinite_matrix_is_told(columns: int, invert: Callable[[Tensor], Tensor]) -> None:
    entries = torch.linspace(1, 2, columns)
    entries[columns // 2] = -1
    assert not invert(torch.diag(entries))
    assert not cholesky.upper_factor_(torch.diag(entries).double())


@pytest.mark.cuda
@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:3", "unstructured:0.5"])
def test_sparsegpt_on_a_gpu(pattern: str, kernels: GpuKernels) -> None:
    """That of the CPU, and the same bytes however rows are split."""
    weight, inputs = layer(rows=48, columns=384, tokens=800, dead=(3,))
    solver = solver_for(SolverSettings(method="sparsegpt", pattern=pattern, kernels=kernels))
    expected = solver.solve(weight, solver.prepare(statistics_of(inputs))).weight
    prepared = solver.prepare(statistics_of(inputs.cuda()))
    found = solver.solve(weight.cuda(), prepared).weight
    same = ((expected != 0) == (found.cpu() != 0)).all(dim=1)
    assert same.double().mean() > 0.9
    torch.testing.assert_close(found.cpu()[same], expected[same], rtol=1e-3, atol=1e-3)
    if solver.separable and kernels == "triton":
        parts = [solver.solve(part.cuda(), prepared).weight for part in weight.split(16)]
        assert torch.equal(torch.cat(parts) != 0, found != 0)
