"""Fewer inputs than columns: solving from the inputs themselves, against the full matrix."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline.config.solver import SolverSettings
from pipeline.solvers.hessian import check_statistics, estimate, scaled_hessian
from pipeline.solvers.inverse import DenseInverse, LowRankInverse, inverse_of
from pipeline.solvers.objective import objective
from pipeline.solvers.refine import refine
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import Statistics
from storage.errors import NumericalError
from tests.support.solver_cases import golden, layer, statistics_of


def both(inputs: torch.Tensor) -> tuple[Statistics, Statistics]:
    """The full matrix of `inputs` (tokens, C), and the inputs in its place."""
    full = statistics_of(inputs)
    return full, dataclasses.replace(full, diagonal=None, hessian=None, inputs=inputs.float())


def case(
    tokens: int, columns: int = 64, dead: tuple[int, ...] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, inputs = layer(rows=48, columns=columns, tokens=tokens, dead=dead)
    return weight, inputs[0]


# damping before the scaling makes what is added to the scaled diagonal anything but constant.
@pytest.mark.parametrize(("damping", "shrinkage"), [(0.0, 0.0), (0.01, 0.0), (0.1, 0.3)])
@pytest.mark.parametrize("rho", [0.05, 1.0])
def test_woodbury_is_the_inverse(damping: float, shrinkage: float, rho: float) -> None:
    _, inputs = case(20, dead=(3, 4))
    problems = [scaled_hessian(s, damping=damping, shrinkage=shrinkage) for s in both(inputs)]
    dense, low = (inverse_of(problem, rho, None) for problem in problems)
    assert isinstance(dense, DenseInverse)
    assert isinstance(low, LowRankInverse)
    assert low.factor.shape == (20, 64)
    assert torch.allclose(low.diagonal(), dense.diagonal(), rtol=1e-4, atol=1e-5)
    product = torch.empty(64, 64)
    low.multiply(torch.eye(64), out=product)
    expected = torch.linalg.inv(problems[0].write(rho).double())
    assert torch.allclose(product.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 7, 33, 63])
@pytest.mark.parametrize(
    "settings",
    [
        SolverSettings(method="prox"),
        SolverSettings(method="prox_admm"),
        SolverSettings(method="prox_admm", damping=0.01, shrinkage=0.0, refine="none"),
        SolverSettings(method="sparsegpt", refine="cg"),
        SolverSettings(method="wanda", refine="cg", damping=0.05, shrinkage=0.1),
        SolverSettings(method="magnitude", refine="gradient", refine_steps=50),
    ],
)
def test_the_objective_is_that_of_the_full_matrix(settings: SolverSettings, tokens: int) -> None:
    weight, inputs = case(tokens)
    solver = solver_for(settings.resolved())
    full, few = both(inputs)
    expected, found = (solver.solve(weight, solver.prepare(s)) for s in (full, few))
    zero = expected.report.objective_zero
    assert found.report.objective_zero == pytest.approx(zero, rel=1e-5)
    assert found.report.objective == pytest.approx(expected.report.objective, abs=1e-4 * zero)
    assert found.report.statistic == "full"
    assert found.report.tokens == tokens
    judged = float(objective(found.weight, weight, full).sum())
    assert judged == pytest.approx(found.report.objective, rel=1e-3, abs=1e-6 * zero)


def test_a_real_layer_with_few_tokens(shared: Path) -> None:
    case = golden(shared, "block5_self_attn_k_proj")
    inputs = case["inputs"].reshape(-1, case["inputs"].shape[-1])[:200].float()
    weight = case["weight"].float()
    solver = solver_for(SolverSettings(method="prox_admm").resolved())
    full, few = (solver.solve(weight, solver.prepare(s)).report for s in both(inputs))
    # Supports that hang by a rounding: the matrix of reordered inputs differs by 2e-4 as well.
    assert few.objective == pytest.approx(full.objective, rel=5e-4)
    assert few.objective == pytest.approx(full.objective, abs=2e-6 * full.objective_zero)


def test_conjugate_gradients_from_inputs_find_the_same_minimum() -> None:
    weight, inputs = case(24)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:, ::2] = True
    found = [
        refine(weight * mask, weight, scaled_hessian(s, damping=0.01, shrinkage=0.0), "cg", 60)
        for s in both(inputs)
    ]
    full, few = (float(refined.after.sum()) for refined in found)
    assert few == pytest.approx(full, rel=1e-4)
    assert few < 0.9 * float(found[0].before.sum())


def test_the_estimate_is_the_same() -> None:
    _, inputs = case(30, dead=(0, 9))
    full, few = both(inputs)
    assert estimate(few) == pytest.approx(estimate(full), rel=1e-4)


@pytest.mark.parametrize("method", ["prox", "prox_admm"])
def test_a_row_slice_is_those_rows_of_the_layer(method: str) -> None:
    weight, inputs = case(21)
    solver = solver_for(SolverSettings(method=method).resolved())
    few = both(inputs)[1]
    whole = solver.solve(weight, solver.prepare(few)).weight
    for rows in (slice(0, 16), slice(16, 48), slice(0, 5)):
        part = solver.solve(weight[rows], solver.prepare(few)).weight
        assert torch.equal(part, whole[rows])


def test_inputs_that_do_not_fit_are_refused() -> None:
    _, inputs = case(10)
    few = both(inputs)[1]
    with pytest.raises(NumericalError, match=r"inputs have shape \(10, 64\), not \(11, 64\)"):
        check_statistics(dataclasses.replace(few, tokens=11))
    inputs[3, 5] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        check_statistics(both(inputs)[1])
