"""Regularization from the counts, and chosen on two halves: held-out error decides."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pipeline.config.solver import SolverSettings
from pipeline.solvers.auto_shrinkage import choose_regularization
from pipeline.solvers.hessian import estimate
from pipeline.solvers.objective import relative_error
from pipeline.solvers.registry import solver_for
from pipeline.worker.solve import choose_settings
from storage.errors import NumericalError
from tests.support.solver_cases import golden, layer, statistics_of

# The best of any method and damping when solved on one sequence and judged on another, percent.
HELD_OUT = {
    "block5_self_attn_k_proj": 1.114,
    "block12_self_attn_o_proj": 6.073,
    "block20_mlp_down_proj": 5.688,
}


@pytest.mark.parametrize("name", HELD_OUT)
def test_the_default_is_best_where_it_was_not_fitted(shared: Path, name: str) -> None:
    data = golden(shared, name)
    solver = solver_for(SolverSettings())
    fit, judge = statistics_of(data["inputs"][:1]), statistics_of(data["inputs"][1:])
    solution = solver.solve(data["weight"], solver.prepare(fit))
    assert relative_error(solution.weight, data["weight"], judge) < HELD_OUT[name]
    assert solution.report.shrinkage > 0.01


@pytest.mark.parametrize("name", HELD_OUT)
def test_the_choice_on_halves_is_good_where_it_was_not_fitted(shared: Path, name: str) -> None:
    data = golden(shared, name)
    first, second = data["inputs"][0, :256], data["inputs"][0, 256:]
    halves = (statistics_of(first), statistics_of(second))
    settings = SolverSettings(shrinkage="auto")
    choice = choose_regularization({"layer": data["weight"]}, halves, settings)
    solver = solver_for(
        dataclasses.replace(settings, damping=choice.damping, shrinkage=choice.shrinkage)
    )
    solution = solver.solve(data["weight"], solver.prepare(statistics_of(data["inputs"][:1])))
    judge = statistics_of(data["inputs"][1:])
    assert relative_error(solution.weight, data["weight"], judge) < 1.1 * HELD_OUT[name]


def test_more_tokens_mean_less_regularization() -> None:
    _, inputs = layer(columns=64, tokens=2048)
    few, many = estimate(statistics_of(inputs[:, :128])), estimate(statistics_of(inputs))
    assert 0 < many[0] < few[0]
    assert 0 < many[1] < few[1]


def test_the_estimate_ignores_scale_and_dead_columns() -> None:
    _, inputs = layer(columns=32, tokens=200)
    damping, shrinkage = estimate(statistics_of(inputs))
    louder = estimate(statistics_of(inputs * 1e6))
    assert louder == pytest.approx((damping, shrinkage), rel=1e-3)
    padded = torch.cat([inputs, torch.zeros(2, 200, 8)], dim=2)
    assert estimate(statistics_of(padded)) == pytest.approx((damping, shrinkage), rel=1e-4)
    rescaled = estimate(statistics_of(inputs * torch.logspace(-2, 2, 32)))
    assert rescaled[1] == pytest.approx(shrinkage, rel=1e-3)  # a matter of correlations alone


def test_the_estimate_of_nothing_is_nothing() -> None:
    assert estimate(statistics_of(torch.zeros(1, 5, 8))) == (0.0, 0.0)
    one = torch.zeros(1, 5, 8)
    one[..., 3] = 1
    assert estimate(statistics_of(one)) == (0.0, 0.0)
    _, inputs = layer()
    inputs[0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match="NaN"):
        estimate(statistics_of(inputs))


def test_noise_without_structure_ends_as_wanda() -> None:
    # Independent inputs, and hardly more of them than columns: every correlation is noise.
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 40, 64, generator=generator)
    weight = torch.randn(64, 64, generator=generator)
    halves = (statistics_of(inputs[0]), statistics_of(inputs[1]))
    choice = choose_regularization({"layer": weight}, halves, SolverSettings(shrinkage="auto"))
    wanda, *others = choice.trials
    assert all(wanda.relative_error <= trial.relative_error for trial in others)
    assert (choice.damping, choice.shrinkage) == (0.0, 1.0)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_never_worse_than_wanda_on_the_other_half(seed: int) -> None:
    weight, inputs = layer(rows=32, columns=48, tokens=24 * (seed + 1), seed=seed)
    halves = (statistics_of(inputs[0]), statistics_of(inputs[1]))
    choice = choose_regularization({"layer": weight}, halves, SolverSettings(shrinkage="auto"))
    wanda = choice.trials[0]
    assert (wanda.damping, wanda.shrinkage) == (0.0, 1.0)
    assert min(trial.relative_error for trial in choice.trials) <= wanda.relative_error
    again = choose_regularization({"layer": weight}, halves, SolverSettings(shrinkage="auto"))
    assert json.dumps(again.to_json()) == json.dumps(choice.to_json())


@pytest.mark.parametrize("degenerate", ["the first half", "the second half", "the weight"])
def test_nothing_is_chosen_where_nothing_can_be_compared(degenerate: str) -> None:
    weight, inputs = layer(rows=32, columns=48)
    nothing = torch.zeros_like(inputs[0])
    first, second = inputs
    if degenerate == "the weight":
        weight = torch.zeros_like(weight)
    elif degenerate == "the first half":
        first = nothing
    else:
        second = nothing
    halves = (statistics_of(first), statistics_of(second))
    settings = SolverSettings(shrinkage="auto")
    assert choose_regularization({"layer": weight}, halves, settings) is None
    choice = choose_settings({"layer": weight}, halves, settings)
    assert choice["shrinkage"] == "estimate"
    assert "instead of auto" in choice["note"]


def test_what_is_given_decides_what_is_estimated() -> None:
    assert SolverSettings().resolved().shrinkage == "estimate"
    alone = SolverSettings(damping=0.05).resolved()
    assert (alone.damping, alone.shrinkage) == (0.05, 0.0)
    beside = SolverSettings(shrinkage=0.2).resolved()
    assert (beside.damping, beside.shrinkage) == (0.01, 0.2)
    reference = SolverSettings(method="sparsegpt").resolved()
    assert (reference.damping, reference.shrinkage) == (0.01, 0.0)
    for settings in (alone, beside, reference, SolverSettings().resolved()):
        assert settings.resolved() == settings
    _, inputs = layer()
    with pytest.raises(ValueError, match="choose_regularization"):
        solver_for(SolverSettings(shrinkage="auto")).prepare(statistics_of(inputs))
