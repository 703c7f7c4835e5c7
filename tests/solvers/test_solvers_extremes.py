"""Singular, empty, huge and tiny problems, and inputs that must be refused before any work."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from pipeline.config.solver import SolverSettings
from pipeline.solvers.base import NO_INPUT
from pipeline.solvers.masks import holds
from pipeline.solvers.objective import relative_error
from pipeline.solvers.registry import solver_for
from pipeline.solvers.stored import as_stored
from pipeline.solvers.types import SolveReport, Statistics, percentage
from pipeline.worker.solve import solve_group
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
        weights = {"model.layers.3.q_proj": torch.randn(4, 8), "k": torch.randn(4, 8)}
        said = (
            r"^layer model\.layers\.3\.q_proj and 1 with the same input: the Hessian is not "
            r"positive definite even at damping 1; use a --shrinkage .*--override LAYER=wanda"
        )
        with pytest.raises(NumericalError, match=said):
            solve_group(weights, statistics, SolverSettings(method=method).resolved(), None)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_statistics_that_are_not_finite_name_the_layers(value: float) -> None:
    weight, inputs = layer()
    statistics = statistics_of(inputs)
    statistics.hessian[3, 3] = value
    settings = SolverSettings().resolved()
    said = r"^layer mlp\.up and 1 with the same input: the Hessian holds NaN or Inf: .*=dense"
    with pytest.raises(NumericalError, match=said):
        solve_group({"mlp.up": weight, "mlp.gate": weight}, statistics, settings, None)


def test_what_a_stored_dtype_does_not_hold() -> None:
    """Too large is an error, with the count and the largest; too small is noted. Never clamped."""
    weight = torch.tensor([[1.0, 0.0, 0.0, 2e-8], [65504.0, 0.0, 0.0, -3.0]])
    stored, notes = as_stored(weight, torch.float16, "do this")
    assert torch.equal(stored, weight.half())
    assert stored[0, 3] == 0
    assert notes == ("kept weights that are too small for float16 are stored as 0",)
    for dtype in (torch.float32, torch.bfloat16):
        stored, notes = as_stored(weight, dtype, "do this")
        assert torch.equal(stored, weight.to(dtype))
        assert notes == ()
    weight[0, 0], weight[1, 3] = -1e5, 7e4
    with pytest.raises(NumericalError) as raised:
        as_stored(weight, torch.float16, "do this")
    assert str(raised.value) == (
        "2 of 8 solved weights are beyond float16, in which the layer is stored: the largest is "
        "1e+05, and float16 ends at 65504; do this"
    )
    weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="1 of 8 solved weights are NaN or Inf; do this"):
        as_stored(weight, torch.float32, "do this")
    assert as_stored(weight[:0], torch.float16, "")[0].shape == (0, 4)


@pytest.mark.parametrize(("refine", "remedy"), [("none", "=wanda'"), ("cg", "--refine none")])
def test_the_remedy_for_weights_too_large_to_be_stored(refine: str, remedy: str) -> None:
    """Weights near the end of float16, and a method that moves some of them further."""
    weight, inputs = layer(rows=64, columns=32)
    weight = (weight.sign() * (60000 + 5000 * weight.sigmoid())).half()
    method = "sparsegpt" if refine == "none" else "wanda"
    settings = SolverSettings(method=method, refine=refine).resolved()
    with pytest.raises(NumericalError, match="are beyond float16") as raised:
        solve_group({"mlp.up": weight}, statistics_of(inputs), settings, None)
    assert str(raised.value).startswith("layer mlp.up: ")
    assert remedy in str(raised.value)
    plain = SolverSettings(method="wanda").resolved()
    stored, _ = solve_group({"mlp.up": weight}, statistics_of(inputs), plain, None)["mlp.up"]
    assert bool(stored.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_hessian_costs_nothing(method: str) -> None:
    weight, _ = layer(rows=5, columns=8)
    zero = torch.zeros(1, 4, 8)
    report = solve(method, weight, statistics_of(zero)).report
    assert report.objective == report.objective_zero == report.relative_error == 0


@pytest.mark.parametrize("kept_inputs", [False, True])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "unstructured:0.5"])
@pytest.mark.parametrize("method", METHODS[1:])
def test_without_inputs_the_largest_weights_are_kept(
    method: str, pattern: str, kept_inputs: bool
) -> None:
    """Not none at all, which would cost nothing, nor the last ones of equal scores."""
    if method == "prox" and pattern != "2:4":
        return
    weight, _ = layer(rows=5, columns=16)
    statistics = statistics_of(torch.zeros(1, 6, 16))
    if kept_inputs:
        statistics = dataclasses.replace(statistics, hessian=None, inputs=torch.zeros(6, 16))
    solution = solve(method, weight, statistics, pattern=pattern, refine="cg")
    group = int(pattern[2:]) if pattern[1] == ":" else 16
    keep = int(pattern[0]) if pattern[1] == ":" else 8
    for row, pruned in zip(weight.view(-1, group), solution.weight.view(-1, group), strict=True):
        expected = torch.zeros(group)
        largest = sorted(range(group), key=lambda j: -abs(float(row[j])))[:keep]
        expected[largest] = row[largest]
        assert torch.equal(pruned, expected)
    report = solution.report
    assert report.deviations == (NO_INPUT,)
    assert (report.dead_inputs, report.objective, report.relative_error) == (16, 0, 0)


def test_magnitude_needs_no_inputs_and_so_departs_from_nothing() -> None:
    weight, _ = layer(rows=5, columns=8)
    report = solve("magnitude", weight, statistics_of(torch.zeros(1, 4, 8))).report
    assert report.deviations == ()


def test_inputs_too_small_to_be_squared_count_as_none() -> None:
    weight, inputs = layer(rows=5, columns=16)
    report = solve("prox_admm", weight, statistics_of(inputs * 1e-30)).report
    assert (report.dead_inputs, report.deviations) == (16, (NO_INPUT,))


@pytest.mark.parametrize("method", METHODS)
def test_dead_columns_are_counted(method: str) -> None:
    weight, inputs = layer(dead=(0, 1, 2, 3, 17))
    report = solve(method, weight, statistics_of(inputs)).report
    assert (report.dead_inputs, report.deviations) == (5, ())


@pytest.mark.parametrize("method", METHODS)
def test_one_input_that_all_tokens_share(method: str) -> None:
    """A constant input: H has rank 1."""
    weight, inputs = layer(rows=8, columns=32)
    constant = inputs[:, :1].expand(2, 50, 32)[:1]
    solution = solve(method, weight, statistics_of(constant), refine="cg")
    assert solution.weight.any(dim=1).all()
    assert solution.report.relative_error < 1


def test_an_error_is_undefined_where_the_dense_outputs_are_0() -> None:
    assert percentage(1.0, 4.0) == 25
    assert percentage(0.0, 0.0) == 0
    assert percentage(1.0, 0.0) is None
    weight = torch.tensor([[3.0, -1.0, -1.0, -1.0]])
    report = solve("magnitude", weight, statistics_of(torch.ones(1, 2, 4))).report
    assert (report.objective_zero, report.relative_error) == (0, None)
    assert report.objective > 0


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
