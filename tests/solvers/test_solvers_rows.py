"""Rows are independent: slices, stacked layers and repeats all give the same weights."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.solver import SolverSettings
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import merge_reports
from tests.support.solver_cases import layer, statistics_of

METHODS = ["magnitude", "wanda", "sparsegpt", "prox", "prox_admm"]


@pytest.mark.parametrize("refine", ["none", "gradient", "cg"])
@pytest.mark.parametrize("method", METHODS)
def test_slices_solve_to_the_whole(method: str, refine: str) -> None:
    weight, inputs = layer(rows=37, columns=64, tokens=100, seed=2)
    weight[9] *= 1e4  # a row far from the others must not set their scale
    weight[20] = 0
    settings = SolverSettings(method=method, refine=refine, refine_steps=25, prox_growth=1.05)
    solver = solver_for(settings)
    prepared = solver.prepare(statistics_of(inputs))
    whole = solver.solve(weight, prepared)
    assert not whole.weight[20].any()
    for slices in (1, 2, 3, 7, 37):
        parts = [solver.solve(part, prepared) for part in torch.tensor_split(weight, slices)]
        assert torch.equal(torch.cat([part.weight for part in parts]), whole.weight)
        merged = merge_reports([part.report for part in parts])
        assert merged.rows == 37
        assert merged.relative_error == pytest.approx(whole.report.relative_error, rel=1e-9)
        assert merged.support_change == pytest.approx(whole.report.support_change, abs=1e-9)


@pytest.mark.parametrize("pattern", ["4:8", "unstructured:0.5"])
@pytest.mark.parametrize("method", ["wanda", "prox_admm"])
def test_other_patterns_are_split_too(method: str, pattern: str) -> None:
    weight, inputs = layer(rows=20, columns=64, tokens=100, seed=2)
    solver = solver_for(SolverSettings(method=method, pattern=pattern))
    assert solver.separable
    prepared = solver.prepare(statistics_of(inputs))
    parts = [solver.solve(part, prepared).weight for part in torch.tensor_split(weight, 3)]
    assert torch.equal(torch.cat(parts), solver.solve(weight, prepared).weight)


@pytest.mark.parametrize("method", METHODS)
def test_layers_of_a_group_solve_as_alone(method: str) -> None:
    weight, inputs = layer(rows=30, columns=32, seed=7)
    layers = {"q": weight[:17], "k": weight[17:17], "v": weight[17:].bfloat16()}
    copies = {name: part.clone() for name, part in layers.items()}
    solver = solver_for(SolverSettings(method=method, prox_growth=1.05))
    statistics = statistics_of(inputs)
    hessian = statistics.hessian.clone()
    prepared = solver.prepare(statistics)
    together = solver.solve_group(layers, prepared)
    assert list(together) == ["q", "k", "v"]
    for name, part in layers.items():
        assert torch.equal(part, copies[name])  # arguments are left as they were
        assert together[name].weight.shape == part.shape
        assert together[name].weight.dtype == torch.float32
        if len(part):
            alone = solver.solve(part, prepared)
            assert torch.equal(alone.weight, together[name].weight)
            assert alone.report == together[name].report
    assert torch.equal(statistics.hessian, hessian)


@pytest.mark.parametrize("pattern", ["unstructured:0.5"])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_methods_that_compare_rows_say_so(method: str, pattern: str) -> None:
    assert not solver_for(SolverSettings(method=method, pattern=pattern)).separable
    assert solver_for(SolverSettings(method=method)).separable


def test_prox_admm_inverts_twice_for_the_whole_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipeline.solvers import inverse as low_rank

    inverted = []
    invert = low_rank.invert_
    monkeypatch.setattr(
        low_rank,
        "invert_",
        lambda matrix, team: inverted.append(matrix.shape) or invert(matrix, team),
    )
    weight, inputs = layer(rows=30, columns=32)
    solver = solver_for(SolverSettings(method="prox_admm"))
    prepared = solver.prepare(statistics_of(inputs))
    solver.solve_group({"gate": weight[:10], "up": weight[10:]}, prepared)
    assert len(inverted) == 2
