"""The fast paths of prox_admm give what the plain ones give."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.pattern import Pattern
from pipeline.runtime.threads import set_threads
from pipeline.solvers.kernels import cholesky
from pipeline.solvers.methods import prox_admm

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


@pytest.mark.parametrize("columns", [4, 300])
def test_an_indefinite_matrix_is_told(columns: int) -> None:
    entries = torch.linspace(1, 2, columns)
    entries[columns // 2] = -1
    assert not cholesky.invert_(torch.diag(entries))
    assert not cholesky.upper_factor_(torch.diag(entries).double())
