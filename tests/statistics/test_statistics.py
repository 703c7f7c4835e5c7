"""Second moments summed batch by batch, held against float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.solvers.types import Statistics
from pipeline.statistics.accumulate import (
    Accumulator,
    Sums,
    add_in_rank_order,
    not_finite_sums,
    panels,
    statistics_bytes,
)
from tests.support.launches import Launches

CPU = torch.device("cpu")


def inputs(columns: int, tokens: int = 512, seed: int = 0) -> Tensor:
    """(4, tokens / 4, C) fp32: correlated columns of unequal size with a mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, tokens // 4, columns, generator=generator)
    return (x + 0.5) * torch.logspace(-2, 2, columns)


def accumulate(x: Tensor, needs: str = "full", batches: int = 4) -> Statistics:
    total = Accumulator(x.shape[-1], needs, CPU)
    for batch in x.chunk(batches):
        total.add(batch, sequences=batch.shape[0])
    return total.statistics()


# 32 is less than a panel, 600 is three of them, the last a narrow one; 2304 is eight wider ones.
@pytest.mark.parametrize("columns", [32, 256, 600, 2304])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hessian_against_float64(columns: int, dtype: torch.dtype) -> None:
    x = inputs(columns).to(dtype)
    found = accumulate(x)
    flat = x.reshape(-1, columns).double()
    exact = flat.T @ flat
    assert found.hessian is not None
    assert found.hessian.dtype == torch.float32
    # Every entry to fp32 rounding on the scale of its row and column: a product or a sum rounded
    # to bfloat16 would be off by 2^-9.
    scale = exact.diagonal().sqrt()
    assert ((found.hessian.double() - exact) / torch.outer(scale, scale)).abs().max() < 2e-6
    assert torch.equal(found.hessian, found.hessian.T)
    assert found.diagonal is not None
    assert torch.equal(found.diagonal, found.hessian.diagonal())
    assert (found.columns, found.tokens, found.sequences) == (columns, 512, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_diagonal_against_float64(dtype: torch.dtype) -> None:
    x = inputs(600).to(dtype)
    found = accumulate(x, "diagonal")
    assert found.hessian is None
    assert found.diagonal is not None
    exact = x.reshape(-1, 600).double().square().sum(dim=0)
    torch.testing.assert_close(found.diagonal.double(), exact, rtol=1e-6, atol=0)


def test_tokens_need_no_batch_dimension() -> None:
    x = inputs(32)
    flat = accumulate(x.reshape(-1, 32), batches=1)
    assert flat.hessian is not None
    assert torch.equal(flat.hessian, accumulate(x, batches=1).hessian)


def test_inputs_are_left_as_they_are() -> None:
    x = inputs(32)
    before = x.clone()
    accumulate(x)
    assert torch.equal(x, before)


def test_a_diagonal_allocates_no_matrix() -> None:
    """In a process of its own, whose peak memory is the kernel's own figure."""
    script = """
import resource, torch
from pipeline.statistics.accumulate import Accumulator
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
columns = 16384
x = torch.ones(8, columns)
warm = Accumulator(64, "diagonal", torch.device("cpu"))
warm.add(torch.ones(8, 64), 1)
before = peak()
total = Accumulator(columns, "diagonal", torch.device("cpu"))
total.add(x, 1)
assert total.statistics().diagonal.sum() == 8 * columns
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).resolve().parent.parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 16384**2  # the matrix would take four times as many bytes


def test_a_gpu_adds_a_panel_in_one_kernel() -> None:
    """Elsewhere than on a CPU: at C = 28,672 a product and a sum for each of eight panels."""
    total = Accumulator(28_672, "full", torch.device("meta"))
    with Launches() as started:
        total.add(torch.empty(8, 28_672, dtype=torch.bfloat16, device="meta"), 1)
    assert started.counted["aten::mm"] == started.counted["aten::add_.Tensor"] == 8
    assert started.total <= 20


@pytest.mark.parametrize("columns", [1, 255, 256, 257, 600, 2048, 2049, 28672])
def test_panels_cover_all_columns(columns: int) -> None:
    found = panels(columns)
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == columns
    assert len(found) <= 8


def sums(x: Tensor, needs: str = "full", batch: int = 1) -> Sums:
    """The sums of the sequences `x` (n, tokens, C), batch by batch."""
    total = Accumulator(x.shape[-1], needs, CPU)
    for own in x.split(batch):
        total.add(own, sequences=own.shape[0])
    return total.sums


def test_the_sum_of_ranks_is_taken_in_rank_order() -> None:
    """On numbers whose sum depends on the order: 1e20 swallows a 1 that comes after it."""

    def part(value: float, tokens: int) -> Sums:
        number = torch.tensor([value], dtype=torch.float64)
        return Sums(columns=1, tokens=tokens, sequences=1, diagonal=number, matrix=number.clone())

    parts = [part(1.0, 3), part(1e20, 4), part(-1e20, 5)]
    found, other = add_in_rank_order(parts), add_in_rank_order(parts[1:] + parts[:1])
    assert (found.tokens, found.sequences) == (12, 3)
    assert (found.matrix.item(), other.matrix.item()) == (0.0, 1.0)
    assert (found.diagonal.item(), other.diagonal.item()) == (0.0, 1.0)
    assert parts[0].matrix.item() == parts[0].diagonal.item() == 1.0  # left as they are


@pytest.mark.parametrize("needs", ["full", "diagonal"])
@pytest.mark.parametrize("columns", [32, 600])
def test_statistics_do_not_depend_on_who_summed_what(columns: int, needs: str) -> None:
    """Same bytes for any number of ranks, with columns of very unequal size."""
    x = inputs(columns, tokens=1024).reshape(16, 64, columns)
    whole = sums(x, needs).statistics()
    for world in (2, 3, 5, 16):
        found = add_in_rank_order([sums(own, needs) for own in x.tensor_split(world)]).statistics()
        assert (found.tokens, found.sequences) == (whole.tokens, whole.sequences) == (1024, 16)
        assert torch.equal(found.diagonal, whole.diagonal)  # type: ignore[arg-type]
        assert (found.hessian is None) == (needs == "diagonal")
        if found.hessian is not None:
            assert torch.equal(found.hessian, whole.hessian)  # type: ignore[arg-type]


def test_what_is_held_is_what_is_planned() -> None:
    for columns, needs in ((32, "full"), (600, "full"), (600, "diagonal")):
        assert Accumulator(columns, needs, CPU).sums.nbytes == statistics_bytes(columns, needs)


@pytest.mark.parametrize("batches", [[3, 5], [3, 5, 20], [40], [31], [32], []])
def test_an_experts_inputs_stand_for_the_matrix_while_they_are_few(batches: list[int]) -> None:
    """Fewer than C: they are kept. From then on the matrix is that of one summed all along."""
    generator = torch.Generator().manual_seed(0)
    plain, kept = (Accumulator(32, "full", CPU, keep) for keep in (False, True))
    for size in batches:
        inputs = torch.randn(size, 32, generator=generator)
        plain.add(inputs, 1)
        kept.add(inputs, 1)
    expected, found = plain.statistics(), kept.statistics()
    assert (found.tokens, found.sequences) == (expected.tokens, expected.sequences)
    if sum(batches) < 32:
        assert found.hessian is None
        assert found.inputs is not None
        assert found.inputs.shape == (sum(batches), 32)
        assert kept.sums.nbytes == 4 * 32 * sum(batches)
        assert torch.allclose(found.inputs.T @ found.inputs, expected.hessian, atol=1e-4)
        kept.sums.spill()
        found = kept.statistics()
    assert found.inputs is None
    assert torch.equal(found.hessian, expected.hessian)


@pytest.mark.parametrize("columns", [32, 600])
@pytest.mark.parametrize(("needs", "keep"), [("full", False), ("full", True), ("diagonal", False)])
@pytest.mark.parametrize("value", [None, torch.inf, torch.nan, 1e30])
def test_groups_whose_sums_are_not_finite_are_found(
    columns: int, needs: str, keep: bool, value: float | None
) -> None:
    """By sums of squares alone: one entry of one token is enough, and finite ones may be too."""
    generator = torch.Generator().manual_seed(0)
    good, bad = (Accumulator(columns, needs, CPU, keep) for _ in range(2))
    for number in range(2):
        x = torch.randn(8, columns, generator=generator).to(torch.bfloat16)
        good.add(x, 1)
        if number and value is not None:
            x[3, columns - 5] = value
        bad.add(x, 1)
    for accumulator in (good, bad):
        expected = accumulator.statistics().diagonal
        assert torch.equal(accumulator.sums.squares().isfinite(), expected.isfinite())
    assert torch.allclose(good.sums.squares(), good.statistics().diagonal)
    sums = {"first": (good.sums,), "second": (good.sums, bad.sums)}
    assert not_finite_sums(sums) == ([] if value is None else ["second"])
    assert not_finite_sums({}) == []


@pytest.mark.parametrize("sizes", [(3, 4, 5), (10, 0, 21), (10, 12, 10), (40, 1, 2), (0, 0, 0)])
def test_ranks_inputs_are_put_together_or_summed(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = [(Accumulator(32, "full", CPU), Accumulator(32, "full", CPU, True)) for _ in sizes]
    for size, both in zip(sizes, ranks, strict=True):
        inputs = torch.randn(size, 32, generator=generator)
        for accumulator in both if size else ():
            accumulator.add(inputs, 1)
    expected = add_in_rank_order([plain.sums for plain, _ in ranks]).statistics()
    total = add_in_rank_order([kept.sums for _, kept in ranks])
    assert (total.inputs is not None) == (sum(sizes) < 32)
    if total.inputs is not None:
        assert torch.equal(total.kept(), torch.cat([kept.sums.kept() for _, kept in ranks]))
        total.spill()
    found = total.statistics()
    assert torch.allclose(found.hessian, expected.hessian, rtol=1e-6, atol=1e-6)
    assert (found.tokens, found.sequences) == (expected.tokens, expected.sequences)
