"""Magnitude, wanda and sparsegpt against other implementations' outputs.

The reference layers come from the methods' own code; a slow implementation of ours, written
from the definitions, covers a checkout without them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config.solver import SolverSettings
from pipeline.solvers.methods.sparsegpt import auto_blocksize
from pipeline.solvers.objective import relative_error
from pipeline.solvers.registry import solver_for
from tests.support.solver_cases import (
    GOLDEN,
    golden,
    layer,
    slow_sparsegpt,
    slow_wanda,
    statistics_of,
)

PATTERNS = {"2_4": "2:4", "4_8": "4:8", "unstructured_50": "unstructured:0.5"}
WIDTHS = {"2:4": (2, 4), "4:8": (4, 8), "1:4": (1, 4), "unstructured:0.5": (0, 0)}


@pytest.mark.parametrize("suffix", PATTERNS)
@pytest.mark.parametrize("name", GOLDEN)
def test_wanda_equals_the_reference(shared: Path, name: str, suffix: str) -> None:
    data = golden(shared, name)
    solver = solver_for(SolverSettings(method="wanda", pattern=PATTERNS[suffix]))
    solution = solver.solve(data["weight"], solver.prepare(statistics_of(data["inputs"])))
    assert torch.equal(solution.weight, data[f"wanda_{suffix}"])


@pytest.mark.parametrize("suffix", PATTERNS)
@pytest.mark.parametrize("name", GOLDEN)
def test_sparsegpt_agrees_with_the_reference(shared: Path, name: str, suffix: str) -> None:
    data = golden(shared, name)
    statistics = statistics_of(data["inputs"])
    solver = solver_for(SolverSettings(method="sparsegpt", pattern=PATTERNS[suffix]))
    solution = solver.solve(data["weight"], solver.prepare(statistics))
    reference = data[f"sparsegpt_{suffix}"]
    agreement = ((solution.weight != 0) == (reference != 0)).float().mean()
    assert float(agreement) >= 0.999
    expected = relative_error(reference, data["weight"], statistics)
    assert solution.report.relative_error == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dead", [(), (3, 4, 5, 6, 7, 20)])
@pytest.mark.parametrize("pattern", WIDTHS)
def test_wanda_equals_its_definition(pattern: str, dead: tuple[int, ...]) -> None:
    weight, inputs = layer(dead=dead)
    solver = solver_for(SolverSettings(method="wanda", pattern=pattern))
    solution = solver.solve(weight, solver.prepare(statistics_of(inputs)))
    assert torch.equal(solution.weight, slow_wanda(weight, inputs, *WIDTHS[pattern]))


@pytest.mark.parametrize("dead", [(), (3, 4, 5, 20)])
@pytest.mark.parametrize("pattern", WIDTHS)
def test_sparsegpt_equals_its_definition(pattern: str, dead: tuple[int, ...]) -> None:
    weight, inputs = layer(dead=dead)
    solver = solver_for(SolverSettings(method="sparsegpt", pattern=pattern, blocksize=8))
    solution = solver.solve(weight, solver.prepare(statistics_of(inputs)))
    expected = slow_sparsegpt(weight, inputs, *WIDTHS[pattern])
    assert torch.equal(solution.weight != 0, expected != 0)
    torch.testing.assert_close(solution.weight.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_lazy_block_changes_nothing_but_rounding() -> None:
    weight, inputs = layer(rows=8, columns=96, tokens=256)
    statistics = statistics_of(inputs)
    results = []
    for blocksize in (4, 6, 32, 1000):  # 6 is rounded up to whole groups
        solver = solver_for(SolverSettings(method="sparsegpt", blocksize=blocksize))
        results.append(solver.solve(weight, solver.prepare(statistics)))
    assert results[1].report.blocksize == 8
    for result in results[1:]:
        assert torch.equal(result.weight != 0, results[0].weight != 0)
        torch.testing.assert_close(result.weight, results[0].weight, rtol=1e-4, atol=1e-4)


def test_magnitude_keeps_the_largest_of_each_group() -> None:
    weight, _ = layer()
    solver = solver_for(SolverSettings(method="magnitude"))
    pruned = solver.solve(weight, solver.prepare(None)).weight
    kept = weight.view(-1, 4).abs().topk(2, dim=1).indices
    expected = torch.zeros(weight.numel() // 4, 4).scatter(
        1, kept, weight.view(-1, 4).gather(1, kept)
    )
    assert torch.equal(pruned, expected.view_as(weight))


def test_unstructured_magnitude_has_one_threshold_for_each_layer() -> None:
    small, large = torch.full((4, 8), 0.1), torch.full((4, 8), 10.0)
    weight = torch.cat([small, large])
    solver = solver_for(SolverSettings(method="magnitude", pattern="unstructured:0.5"))
    assert not solver.separable
    assert torch.equal(
        solver.solve(weight, solver.prepare(None)).weight, torch.cat([small * 0, large])
    )
    # Two layers of a group do not share it.
    both = solver.solve_group({"a": small, "b": large}, solver.prepare(None))
    assert int((both["a"].weight != 0).sum()) == int((both["b"].weight != 0).sum()) == 16


def test_the_automatic_lazy_block_is_a_rule_of_the_width() -> None:
    weight, inputs = layer(rows=4, columns=64)
    solver = solver_for(SolverSettings(method="sparsegpt", blocksize="auto"))
    report = solver.solve(weight, solver.prepare(statistics_of(inputs))).report
    assert report.blocksize == auto_blocksize(64, "cpu")
    widths = [auto_blocksize(columns, "cpu") for columns in (64, 512, 2048, 8192, 28672)]
    assert widths == sorted(widths)
    assert all(width % 16 == 0 for width in widths)
    assert auto_blocksize(8192, "cuda") == 128
