"""Singular, empty, huge and tiny problems, and inputs that must be refused before any work."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from pipeline.config.solver import SolverSettings
from pipeline.solvers.masks import holds
from pipeline.solvers.objective import relative_error
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import SolveReport, Statistics
from storage.errors import ConfigError, NumericalError
from tests.support.solver_cases import layer, statistics_of

METHODS = ["magnitude", "wanda", "sparsegpt", "prox", "prox_admm"]


def solve(method: str, weight: torch.Tensor, statistics: Statistics, **settings: object):
    solver = solver_for(SolverSettings(method=method, prox_growth=1.05, **settings))
    solution = solver.solve(weight, solver.prepare(statistics))
    assert holds(solver.pattern, solution.weight)
    assert bool(torch.isfinite(solution.weight).all())
    return solution


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("method", METHODS)
def test_fewer_tokens_than_columns(method: str, damping: float) -> None:
    weight, inputs = layer(rows=8, columns=32, tokens=3)
    solution = solve(method, weight, statistics_of(inputs), damping=damping, refine="cg")
    assert solution.report.relative_error <= 100


def test_sparsegpt_raises_the_damping_of_a_singular_hessian_and_says_so() -> None:
    weight, inputs = layer(rows=8, columns=32, tokens=3)
    report = solve("sparsegpt", weight, statistics_of(inputs), damping=0.0).report
    assert report.damping == 1e-4
    assert report.deviations == ("damping raised from 0 to 0.0001: not positive definite",)


def test_a_matrix_that_is_no_hessian_is_refused() -> None:
    indefinite = torch.full((8, 8), -1e6)
    indefinite.diagonal().fill_(1)
    statistics = Statistics(columns=8, tokens=10, sequences=1, hessian=indefinite)
    for method in ("sparsegpt", "prox_admm"):
        solver = solver_for(SolverSettings(method=method))
        with pytest.raises(NumericalError, match="not positive definite"):
            solver.solve(torch.randn(4, 8), solver.prepare(statistics))


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_hessian_costs_nothing(method: str) -> None:
    weight, _ = layer(rows=5, columns=8)
    zero = torch.zeros(1, 4, 8)
    report = solve(method, weight, statistics_of(zero)).report
    assert report.objective == report.objective_zero == report.relative_error == 0


@pytest.mark.parametrize("method", ["sparsegpt", "prox", "prox_admm"])
def test_dead_columns_become_zero(method: str) -> None:
    weight, inputs = layer(dead=(0, 1, 2, 3, 17))
    solution = solve(method, weight, statistics_of(inputs))
    assert not solution.weight[:, [0, 1, 2, 3, 17]].any()
    alive = torch.tensor([j for j in range(32) if j not in (0, 1, 2, 3)])
    # A group without inputs beside the others changes nothing for them.
    same = solve(method, weight[:, alive], statistics_of(inputs[..., alive]))
    if method != "sparsegpt":  # there dead columns are part of the damping's mean
        assert torch.equal(same.weight != 0, solution.weight[:, alive] != 0)


@pytest.mark.parametrize("weights", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("inputs_scale", [1e-16, 1.0, 1e15])
@pytest.mark.parametrize("method", METHODS)
def test_huge_and_tiny_numbers(method: str, weights: float, inputs_scale: float) -> None:
    weight, inputs = layer(rows=4, columns=16, tokens=64)
    plain = solve(method, weight, statistics_of(inputs), refine="cg")
    scaled = solve(method, weight * weights, statistics_of(inputs * inputs_scale), refine="cg")
    assert torch.equal(scaled.weight != 0, plain.weight != 0)
    assert scaled.report.relative_error == pytest.approx(plain.report.relative_error, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_columns_from_tiny_to_huge(method: str) -> None:
    weight, inputs = layer(rows=4, columns=16, tokens=64)
    inputs = inputs * torch.logspace(-15, 15, 16)
    solution = solve(method, weight, statistics_of(inputs))
    assert solution.report.relative_error <= 100


@pytest.mark.parametrize("method", METHODS)
def test_one_row_one_group(method: str) -> None:
    weight, inputs = layer(rows=1, columns=4, tokens=20)
    statistics = statistics_of(inputs)
    solution = solve(method, weight, statistics, refine="cg", damping=0.0, shrinkage=0.0)
    # Six supports: the best of them by normal equations is the least that can be lost.
    hessian = statistics.hessian.double()
    best = torch.inf
    for first in range(4):
        for second in range(first + 1, 4):
            support = [first, second]
            candidate = torch.zeros(1, 4)
            kept = torch.linalg.solve(
                hessian[support][:, support], hessian[support] @ weight[0].double()
            )
            candidate[0, support] = kept.float()
            best = min(best, relative_error(candidate, weight, statistics))
    assert solution.report.relative_error >= best * (1 - 1e-5)
    if method == "prox_admm":
        assert solution.report.relative_error == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", METHODS)
def test_nan_in_a_weight_names_the_layer(method: str, value: float) -> None:
    weight, inputs = layer()
    bad = weight.clone()
    bad[3, 4] = value
    solver = solver_for(SolverSettings(method=method))
    prepared = solver.prepare(statistics_of(inputs))
    with pytest.raises(NumericalError, match=r"layer mlp\.up_proj: .*NaN or Inf"):
        solver.solve_group({"mlp.gate_proj": weight, "mlp.up_proj": bad}, prepared)


@pytest.mark.parametrize("method", METHODS[1:])
def test_nan_in_the_statistics_is_refused(method: str) -> None:
    _, inputs = layer()
    inputs[0, 0, 7] = torch.nan
    with pytest.raises(NumericalError, match="NaN or Inf"):
        solver_for(SolverSettings(method=method)).prepare(statistics_of(inputs))


def test_statistics_that_cannot_be_right_are_refused() -> None:
    _, inputs = layer()
    statistics = statistics_of(inputs)
    solver = solver_for(SolverSettings(method="prox_admm"))
    with pytest.raises(NumericalError, match="no calibration tokens"):
        solver.prepare(dataclasses.replace(statistics, tokens=0))
    with pytest.raises(NumericalError, match="full"):
        solver.prepare(dataclasses.replace(statistics, hessian=None))
    with pytest.raises(NumericalError, match="full"):
        solver.prepare(None)
    with pytest.raises(NumericalError, match="shape"):
        solver.prepare(dataclasses.replace(statistics, hessian=torch.eye(8)))
    with pytest.raises(NumericalError, match="negative"):
        solver.prepare(dataclasses.replace(statistics, hessian=-statistics.hessian))
    with pytest.raises(NumericalError, match="columns"):
        solver.solve(torch.randn(4, 16), solver.prepare(statistics))


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "sgd"},
        {"pattern": "4:4"},
        {"damping": -0.1},
        {"damping": float("nan")},
        {"shrinkage": 1.5},
        {"shrinkage": "often"},
        {"blocksize": 0},
        {"blocksize": "large"},
        {"refine": "newton"},
        {"refine_steps": -1},
        {"admm_rho": 0.0},
        {"prox_growth": 1.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SolverSettings(**wrong)


def test_prox_refuses_other_patterns_and_names_a_way_out() -> None:
    with pytest.raises(ConfigError, match="prox_admm"):
        solver_for(SolverSettings(method="prox", pattern="4:8"))


def test_settings_and_reports_survive_json() -> None:
    settings = SolverSettings(method="sparsegpt", shrinkage=0.03, refine="cg").resolved()
    assert SolverSettings(**json.loads(json.dumps(settings.to_json()))) == settings
    assert settings.resolved() == settings
    weight, inputs = layer()
    report = solve("prox_admm", weight, statistics_of(inputs)).report
    assert SolveReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    assert report.damping > 0
    assert report.iterations > 0
    assert 0 <= report.support_change <= 1
