"""Inverses that several workers compute together: the bytes of one that a worker computes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pipeline.config.solver import SolverSettings
from pipeline.models.forward_capture import LayerGroup
from pipeline.solvers.cost import together_bytes
from pipeline.solvers.kernels import cholesky
from pipeline.solvers.registry import solver_for
from pipeline.worker.solve import MOST_ROWS, deal_rows, teams
from tests.planning.test_plan_counts import counting
from tests.support.solver_cases import layer, statistics_of
from tests.support.teams import Member, Table, together


def matrix_of(columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(columns // 2, columns, generator=generator)
    return inputs.T @ inputs / len(inputs) + 0.1 * torch.eye(columns)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("columns", [4, 700, 2100])
@pytest.mark.parametrize("invert", [cholesky.invert_, cholesky.invert_blocks_])
def test_the_bytes_are_those_of_one_worker(
    columns: int, size: int, invert: Callable[..., Tensor]
) -> None:
    """Also with pieces that no whole number of blocks fills, and with more members than pieces."""
    alone = matrix_of(columns)
    assert invert(alone)

    def work(member: Member) -> Tensor:
        own = matrix_of(columns)
        # Nobody may read what is not of the lower triangle.
        own += torch.triu(torch.full_like(own, torch.nan), 1)
        assert invert(own, member)
        return own

    for found in together(size, work)[0]:
        assert torch.equal(found, alone)


def test_each_member_computes_its_share_and_little_is_sent() -> None:
    columns, size = 8192, 4
    whole = cholesky.sweep_operations(columns, "cuda")

    class Counted(Member):
        """Sends nothing."""

        def send(self, tensor: Tensor, owner: int) -> None:
            if self.index == owner:
                self.table.sent += tensor.nbytes

    operations, table = [], Table(size)
    for index in range(size):
        with counting() as counter:
            matrix = torch.empty(columns, columns, device="meta")
            cholesky.invert_blocks_(matrix, Counted(index, size, table))
        operations.append(counter.get_total_flops())
    # What all compute: the panels times their pivots.
    common = 2.0 * columns**2 * 512
    for each in operations:
        assert each < 1.1 / size * (whole - common) + common
    assert sum(operations) == whole + (size - 1) * common
    assert table.sent == pytest.approx(together_bytes(columns), rel=0.25)


@pytest.mark.parametrize("size", [1, 3])
def test_an_indefinite_matrix_is_told_to_all(size: int) -> None:
    entries = torch.linspace(1, 2, 1500)
    entries[1100] = -1
    found, _ = together(size, lambda member: cholesky.invert_blocks_(torch.diag(entries), member))
    assert not any(bool(each) for each in found)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("definite", [True, False])
def test_rows_of_a_team_are_those_of_one_worker(size: int, definite: bool) -> None:
    """Also where the damping has to be raised, which all members find at once."""
    weight, inputs = layer(rows=96, columns=600, tokens=150)
    statistics = statistics_of(inputs)
    assert statistics.hessian is not None
    if not definite:
        statistics.hessian.diagonal().mul_(0.8)
        statistics = replace(statistics, diagonal=statistics.hessian.diagonal().clone())
    solver = solver_for(SolverSettings(shrinkage="0", damping=0.01).resolved())
    alone = solver.solve(weight, solver.prepare(statistics))
    assert (alone.report.damping == 0.01) == definite

    def work(member: Member) -> Tensor:
        rows = slice(member.index * 96 // size, (member.index + 1) * 96 // size)
        prepared = replace(solver.prepare(statistics), team=member)
        return solver.solve(weight[rows], prepared).weight

    found, table = together(size, work)
    assert torch.equal(torch.cat(found), alone.weight)
    assert table.sent


# -- who computes together -----------------------------------------------------------------------


def block(hidden: int, wide: int) -> tuple[list[LayerGroup], dict[str, tuple[int, int]]]:
    """The groups of a block of Llama, and the shapes of their layers."""
    shapes = {
        "q": (hidden, hidden), "k": (1024, hidden), "v": (1024, hidden), "o": (hidden, hidden),
        "gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide),
    }  # fmt: skip
    names = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
    return [LayerGroup(each, shapes[each[0]][1]) for each in names], shapes


def dealt(
    hidden: int, wide: int, world: int, nodes: int | None, method: str = "prox_admm"
) -> tuple[list[dict[str, tuple[int, int]]], Mapping[str, tuple[int, ...]]]:
    groups, shapes = block(hidden, wide)
    settings = dict.fromkeys(shapes, SolverSettings(method=method).resolved())
    ranges = deal_rows(settings, groups, shapes, world, "cuda", nodes)
    return ranges, teams(settings, groups, shapes, ranges, "cuda", nodes)


def test_the_wide_layer_of_a_large_model_is_solved_together() -> None:
    for hidden, wide, world, nodes in ((8192, 28_672, 8, 1), (16_384, 53_248, 16, 2)):
        ranges, joint = dealt(hidden, wide, world, nodes)
        members = tuple(rank for rank, rows in enumerate(ranges) if "down" in rows)
        assert joint == {"down": members}
        assert 1 < len(members) < world


def test_small_inverses_are_repeated() -> None:
    assert not dealt(2048, 8192, 8, 1)[1]


def test_nothing_is_computed_together_without_gpus_that_send_to_each_other() -> None:
    assert not dealt(8192, 28_672, 8, None)[1]
    assert not dealt(8192, 28_672, 1, 1)[1]


@pytest.mark.parametrize("method", ["prox", "sparsegpt", "wanda", "magnitude"])
def test_other_methods_compute_nothing_together(method: str) -> None:
    assert not dealt(8192, 28_672, 8, 1, method)[1]


def test_rows_in_several_parts_are_not_solved_together() -> None:
    """The ranks would call each other as often as they have parts, which differ."""
    columns = 28_672
    rows = MOST_ROWS * columns
    for more, expected in ((0, 1), (16, 0)):
        shapes = {"expert": (rows + more, columns)}
        settings = dict.fromkeys(shapes, SolverSettings().resolved())
        groups = [LayerGroup(("expert",), columns)]
        ranges = deal_rows(settings, groups, shapes, 4, "cuda", 1)
        assert len(teams(settings, groups, shapes, ranges, "cuda", 1)) == expected
