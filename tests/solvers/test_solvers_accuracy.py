"""How good the solutions are: the figures the default must reach, and the order of the methods."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config.solver import SolverSettings
from pipeline.solvers.masks import holds
from pipeline.solvers.objective import relative_error
from pipeline.solvers.registry import solver_for
from tests.support.solver_cases import golden, layer, statistics_of

# What an untuned trial of the same idea reached at damping 0.01, in percent.
TARGETS = {
    "block5_self_attn_k_proj": 0.225,
    "block12_self_attn_o_proj": 1.130,
    "block20_mlp_down_proj": 0.170,
    "dead_columns": 1.862,
}


@pytest.mark.parametrize("name", TARGETS)
def test_prox_admm_reaches_its_target(shared: Path, name: str) -> None:
    data = golden(shared, name)
    solver = solver_for(SolverSettings(method="prox_admm", damping=0.01, shrinkage=0.0))
    solution = solver.solve(data["weight"], solver.prepare(statistics_of(data["inputs"])))
    assert holds(solver.pattern, solution.weight)
    assert solution.report.relative_error <= TARGETS[name]


def test_the_methods_come_in_their_order() -> None:
    weight, inputs = layer(rows=32, columns=64, tokens=200, seed=3)
    statistics = statistics_of(inputs)
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt", "prox", "prox_admm"):
        solver = solver_for(SolverSettings(method=method, damping=0.01, shrinkage=0.0))
        solution = solver.solve(weight, solver.prepare(statistics))
        assert holds(solver.pattern, solution.weight)
        errors[method] = solution.report.relative_error
        assert errors[method] == pytest.approx(
            relative_error(solution.weight, weight, statistics), rel=1e-6
        )
    assert errors["magnitude"] > errors["wanda"] > errors["sparsegpt"]
    assert errors["sparsegpt"] > errors["prox"] > 0.8 * errors["prox_admm"]


@pytest.mark.parametrize("pattern", ["4:8", "1:4", "unstructured:0.5"])
def test_prox_admm_by_projection_beats_sparsegpt_with_refinement(pattern: str) -> None:
    weight, inputs = layer(rows=32, columns=64, tokens=200, seed=4)
    statistics = statistics_of(inputs)
    errors = {}
    for method in ("sparsegpt", "prox_admm"):
        settings = SolverSettings(
            method=method, pattern=pattern, damping=0.01, shrinkage=0.0, refine="cg"
        )
        solver = solver_for(settings)
        solution = solver.solve(weight, solver.prepare(statistics))
        assert holds(solver.pattern, solution.weight)
        errors[method] = solution.report.relative_error
    assert errors["prox_admm"] < errors["sparsegpt"]


def test_a_diagonal_hessian_is_solved_almost_exactly() -> None:
    # Wanda's mask with the weights as they are is then optimal; the prox family may confuse two
    # entries that are nearly equal.
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(6, 16, generator=generator)
    inputs = torch.diag(torch.rand(16, generator=generator) + 0.2)[None]
    statistics = statistics_of(inputs)
    wanda = solver_for(SolverSettings(method="wanda"))
    best = wanda.solve(weight, wanda.prepare(statistics))
    for method in ("sparsegpt", "prox", "prox_admm"):
        solver = solver_for(SolverSettings(method=method, damping=0.0, shrinkage=0.0))
        solution = solver.solve(weight, solver.prepare(statistics))
        assert best.report.objective * (1 - 1e-6) <= solution.report.objective
        assert solution.report.objective <= best.report.objective * 1.05
        if method == "sparsegpt":
            torch.testing.assert_close(solution.weight, best.weight)


def test_full_shrinkage_is_wanda() -> None:
    weight, inputs = layer(seed=6)
    statistics = statistics_of(inputs)
    wanda = solver_for(SolverSettings(method="wanda"))
    expected = wanda.solve(weight, wanda.prepare(statistics)).weight
    for method in ("prox", "prox_admm"):
        solver = solver_for(SolverSettings(method=method, damping=0.0, shrinkage=1.0))
        solution = solver.solve(weight, solver.prepare(statistics))
        assert torch.equal(solution.weight, expected)
