"""Solves on several threads: the same bytes as on one, for whole layers and for slices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pipeline.config.solver import SolverSettings
from pipeline.runtime.threads import LEAST_ROWS, row_pieces, set_threads
from pipeline.solvers.auto_shrinkage import choose_regularization
from pipeline.solvers.base import BaseSolver
from pipeline.solvers.kernels import cholesky
from pipeline.solvers.registry import solver_class, solver_for
from pipeline.solvers.types import merge_reports
from tests.support.solver_cases import layer, statistics_of

METHODS = ["magnitude", "wanda", "sparsegpt", "prox", "prox_admm"]
THREADS = (2, 3, 8)
ROWS, COLUMNS = 1037, 64


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    yield
    set_threads(1)


def solver(method: str, refine: str, monkeypatch: pytest.MonkeyPatch) -> BaseSolver:
    """With enough pieces for several threads, whatever pieces the method likes."""
    if solver_class(method).least_rows is not None:
        monkeypatch.setattr(solver_class(method), "least_rows", LEAST_ROWS)
    settings = SolverSettings(method=method, refine=refine, refine_steps=6, prox_growth=1.1)
    return solver_for(settings)


@pytest.mark.parametrize(
    ("method", "refine"),
    [*((method, "cg") for method in METHODS), ("wanda", "gradient"), ("prox_admm", "none")],
)
def test_threads_change_no_byte(method: str, refine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer(rows=ROWS, columns=COLUMNS, tokens=300, seed=2)
    assert len(row_pieces(weight)) == 4
    tried = solver(method, refine, monkeypatch)
    prepared = tried.prepare(statistics_of(inputs))
    whole = tried.solve(weight, prepared)
    for count in THREADS:
        set_threads(count)
        prepared = tried.prepare(statistics_of(inputs))
        assert torch.equal(tried.solve(weight, prepared).weight, whole.weight)
        assert tried.solve(weight, prepared).report == whole.report
        # A slice has other pieces than the whole.
        parts = [tried.solve(part, prepared) for part in weight.split([700, ROWS - 700])]
        assert torch.equal(torch.cat([part.weight for part in parts]), whole.weight)
        merged = merge_reports([part.report for part in parts])
        assert merged.objective == pytest.approx(whole.report.objective, rel=1e-9)


@pytest.mark.parametrize("method", ["sparsegpt", "prox_admm"])
def test_wide_layers(method: str) -> None:
    """Of a width at which the factorizations are cut into several blocks and pieces."""
    weight, inputs = layer(rows=16, columns=600, tokens=900, seed=4)
    tried = solver_for(SolverSettings(method=method))
    statistics = statistics_of(inputs)
    whole = tried.solve(weight, tried.prepare(statistics))
    for count in THREADS:
        set_threads(count)
        assert torch.equal(tried.solve(weight, tried.prepare(statistics)).weight, whole.weight)


def test_the_choice_of_the_regularization() -> None:
    weight, inputs = layer(rows=ROWS, columns=COLUMNS, tokens=300, seed=2)
    halves = (statistics_of(inputs[0]), statistics_of(inputs[1]))
    settings = SolverSettings(shrinkage="auto")
    one = choose_regularization({"q": weight}, halves, settings)
    set_threads(3)
    assert choose_regularization({"q": weight}, halves, settings) == one


@pytest.mark.parametrize("columns", [100, 600])
def test_factorizations(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(2 * columns, columns, generator=generator, dtype=torch.float64)
    matrix = inputs.T @ inputs / len(inputs)
    for function, dtype in (
        (cholesky.invert_, torch.float32),
        (cholesky.upper_factor_, torch.float64),
    ):
        found = []
        for count in (1, *THREADS):
            set_threads(count)
            found.append(matrix.to(dtype, copy=True))
            assert function(found[-1])
        assert all(torch.equal(found[0], other) for other in found)
