"""Refinement on a fixed mask: it reaches the minimizer and never makes a row worse."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.solver import SolverSettings
from pipeline.solvers.hessian import scaled_hessian
from pipeline.solvers.objective import objective
from pipeline.solvers.refine import refine
from pipeline.solvers.registry import solver_for
from tests.support.solver_cases import layer, statistics_of


@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
@pytest.mark.parametrize(("kind", "steps"), [("gradient", 4000), ("cg", 40)])
def test_both_ways_reach_the_minimizer(kind: str, steps: int, shrinkage: float) -> None:
    weight, inputs = layer(dead=(5,))
    statistics = statistics_of(inputs)
    problem = scaled_hessian(statistics, damping=0.01, shrinkage=shrinkage)
    wanda = solver_for(SolverSettings(method="wanda"))
    start = wanda.solve(weight, wanda.prepare(statistics)).weight
    refined = refine(start, weight, problem, kind, steps)

    # The minimizer of every row by the normal equations on its support, in float64.
    mean = statistics.hessian.double() / statistics.tokens
    hessian = (1 - shrinkage) * mean + shrinkage * torch.diag(mean.diagonal())
    live = mean.diagonal() > 0
    hessian += 0.01 * mean.diagonal()[live].mean() * torch.diag(live.double())
    for row in range(len(weight)):
        support = ((start[row] != 0) & live).nonzero()[:, 0]
        right = hessian[support] @ weight[row].double()
        expected = torch.linalg.solve(hessian[support][:, support], right)
        torch.testing.assert_close(
            refined.weight[row, support].double(), expected, rtol=1e-3, atol=1e-3
        )
    assert not refined.weight[start == 0].any()
    assert bool((refined.after <= refined.before).all())


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "prox", "prox_admm"])
@pytest.mark.parametrize("kind", ["gradient", "cg"])
def test_no_row_of_any_method_gets_worse(method: str, kind: str) -> None:
    weight, inputs = layer(rows=24, columns=48, tokens=30, seed=1)  # fewer tokens than twice C
    statistics = statistics_of(inputs)
    settings = {"method": method, "shrinkage": 0.1, "damping": 0.01, "prox_growth": 1.05}
    plain = solver_for(SolverSettings(**settings, refine="none"))
    refining = solver_for(SolverSettings(**settings, refine=kind, refine_steps=60))
    before = plain.solve(weight, plain.prepare(statistics))
    after = refining.solve(weight, refining.prepare(statistics))
    assert torch.equal((after.weight != 0) & (before.weight == 0), torch.zeros_like(weight) != 0)
    rows_before = objective(before.weight, weight, statistics)
    rows_after = objective(after.weight, weight, statistics)
    assert bool((rows_after <= rows_before).all())
    assert float(rows_after.sum()) < float(rows_before.sum())
    assert after.report.objective_before == pytest.approx(float(rows_before.sum()))
    assert after.report.objective == pytest.approx(float(rows_after.sum()))


def test_a_row_that_would_get_worse_is_kept() -> None:
    # The plain objective is at its minimum on the mask; a strong shrinkage pulls away from it.
    weight, inputs = layer()
    statistics = statistics_of(inputs)
    wanda = solver_for(SolverSettings(method="wanda"))
    start = wanda.solve(weight, wanda.prepare(statistics)).weight
    exact = refine(start, weight, scaled_hessian(statistics, damping=0.0, shrinkage=0.0), "cg", 200)
    problem = scaled_hessian(statistics, damping=0.0, shrinkage=0.9)
    again = refine(exact.weight, weight, problem, "cg", 50)
    assert bool(again.kept.all())
    assert torch.equal(again.weight, exact.weight)
    assert torch.equal(again.after, exact.after)


def test_an_explicit_refinement_asks_for_the_full_hessian() -> None:
    assert solver_for(SolverSettings(method="magnitude")).needs == "none"
    assert solver_for(SolverSettings(method="wanda")).needs == "diagonal"
    assert solver_for(SolverSettings(method="magnitude", refine="cg")).needs == "full"
    assert SolverSettings(method="wanda").resolved().refine == "none"
    assert SolverSettings(method="prox").resolved().refine == "cg"
    assert SolverSettings(method="prox", refine="none").resolved().refine == "none"
