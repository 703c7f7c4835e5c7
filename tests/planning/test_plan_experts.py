"""The plan of mixtures of experts, of overrides and of blocks that stay dense: as a job does it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.commands.plan import plan_text
from pipeline.config.solver import SolverSettings
from pipeline.loop.rank import Call
from pipeline.messages import Outcome
from pipeline.planning.counts import solve_counts
from pipeline.planning.options import PlanConfig, planned_job, planned_shape
from pipeline.planning.plan import Plan
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.shapes.experts import most_sum_bytes
from pipeline.planning.to_json import plan_to_json
from pipeline.solvers.cost import objective_share
from pipeline.solvers.registry import solver_for
from pipeline.statistics.accumulate import Accumulator
from pipeline.worker.local_executor import LocalExecutor
from tests.planning.test_plan_counts import counting
from tests.support.counted import ON_RESPONSES, cut_turns
from tests.support.jobs import SMALL, prune_here
from tests.support.moe_models import save_moe

TinyModel = Callable[..., Path]
SHARED = {name: SMALL[name] for name in ("nsamples", "seqlen", "batch_size")}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of 16 experts, of which each token is sent to two."""
    folder = tmp_path_factory.mktemp("mixture")
    return save_moe(folder, "olmoe", num_experts=16, hidden_size=32, intermediate_size=64)


def planned(model: Path, **options: Any) -> PlannedJob:
    """The job that `prox24 plan` plans with the options; on CPU workers."""
    config = PlanConfig(**(SHARED | {"workers": 1, "threads": 1} | options))
    return planned_job(planned_shape(model, config), config)


class Noted(LocalExecutor):
    """The local executor; notes each phase that it runs, and the bytes of its last running sums."""

    def __init__(self, world: int) -> None:
        super().__init__(world, 1)
        self.phases: list[str] = []
        self.summed = 0

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        self.phases.append(calls[0].phase)
        return super().run(calls)

    def reduce(self) -> list[Outcome]:
        self.phases.append("reduce")
        halves = itertools.chain(*(worker.state.sums.values() for worker in self._workers))
        self.summed = sum(sums.nbytes for sums in itertools.chain(*halves))
        return super().reduce()


# -- experts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("everything", [False, True])
def test_groups_and_sums_are_those_of_a_job(
    mixture: Path, tmp_path: Path, everything: bool
) -> None:
    """8 x 32 tokens, of 16 experts each gets 32 on the average: some keep them, some do not."""
    options: dict[str, Any] = {"calibrate_all_experts": everything}
    executor = Noted(1)
    options |= {"method": "sparsegpt", "blocks": "0"}
    result = prune_here(mixture, tmp_path / "output", executor=executor, **options)
    job = planned(mixture, **options)
    block, groups = job.shape.kind(0), result.summary["blocks"][0]["groups"]
    assert [len(group.layers) for group in block.groups] == [len(names) for names in groups]
    held = executor.summed
    even, uneven = job.sums(block.groups), replace(job, uneven=True).sums(block.groups)
    if everything:
        assert held == even == uneven
    else:
        assert min(even, held) > 0
        assert held <= uneven
        assert even <= uneven


def test_inputs_that_are_kept_are_counted_whatever_the_routing(
    mixture: Path, tmp_path: Path
) -> None:
    """Of 8 tokens none fills an expert: the bytes depend on no routing."""
    few: dict[str, Any] = {"nsamples": 2, "seqlen": 4, "batch_size": 1, "blocks": "0"}
    executor = Noted(1)
    prune_here(mixture, tmp_path / "output", executor=executor, method="sparsegpt", **few)
    job = planned(mixture, method="sparsegpt", **few)
    groups = job.shape.kind(0).groups
    assert executor.summed == job.sums(groups) == replace(job, uneven=True).sums(groups)
    # Where only some of them count, the others are not kept.
    some: dict[str, Any] = {"executor": executor, "cut": cut_turns, **ON_RESPONSES}
    result = prune_here(mixture, tmp_path / "some", method="sparsegpt", **few, **some)
    count = result.summary["blocks"][0]["layers"]["self_attn.q_proj"]["tokens"]
    assert 0 < count < 8
    assert executor.summed == replace(job, counted_share=count / 8).sums(groups)


@given(
    count=st.integers(1, 4), active=st.integers(1, 3), tokens=st.integers(0, 5),
    columns=st.integers(1, 4), each=st.integers(1, 3), more=st.integers(0, 30),
)  # fmt: skip
def test_no_routing_holds_more(
    count: int, active: int, tokens: int, columns: int, each: int, more: int
) -> None:
    """All routings tried: each token goes to `active` experts, all of them or others."""
    matrix = columns * each + more
    active = min(active, count)

    def held(seen: tuple[int, ...]) -> int:
        return sum(n * each if n < columns else matrix for n in seen)

    routings = itertools.product(range(tokens + 1), repeat=count)
    most = max(held(seen) for seen in routings if sum(seen) <= active * tokens)
    assert most_sum_bytes(count, active, tokens, columns, matrix, each) == most


def test_an_expert_of_few_tokens_is_planned_by_wanda(mixture: Path) -> None:
    few, all_ = planned(mixture, expert_tokens=33), planned(mixture, expert_tokens=32)
    expert = next(group for group in few.shape.kind(0).groups if group.active)
    assert few.tokens(expert) == 32
    assert [job.solved_with(expert).method for job in (few, all_)] == ["wanda", "prox_admm"]
    solves = [Plan(job).totals()["solve"]["seconds"] for job in (few, all_)]
    assert solves[0] < solves[1]
    every = planned(mixture, expert_tokens=33, calibrate_all_experts=True)
    assert all(every.tokens(group) == 256 for group in every.shape.kind(0).groups)
    assert all(every.solved_with(group) == every.settings for group in every.shape.kind(0).groups)


def test_memory_holds_for_any_routing_and_time_for_an_even_one(tmp_path: Path) -> None:
    model = save_moe(
        tmp_path / "model", "olmoe", num_experts=16, hidden_size=256, intermediate_size=64
    )
    job = planned(model, nsamples=8, seqlen=128, batch_size=2)
    plan, worst = Plan(job), Plan(replace(job, uneven=True))
    assert plan.needs() == worst.needs()
    held = [
        [phase.peak.device for _, _, phase in p.phases() if phase.name in ("calibrate", "advance")]
        for p in (plan, worst)
    ]
    assert all(even < most for even, most in zip(*held, strict=True))
    # A limit is one of matrices: with it, any routing holds no more.
    limited = planned(model, nsamples=8, seqlen=128, batch_size=2, hessian_memory=0.003)
    passes = limited.passes(limited.shape.kind(0))
    assert len(passes) > 1
    for each in passes:
        assert replace(limited, uneven=True).sums(each.groups) <= 0.003e9
    assert sum(len(each.groups) for each in passes) == len(limited.shape.kind(0).groups)
    assert Plan(limited).totals()["calibrate"]["count"] == 2 * len(passes) - 1
    assert "routing is taken as even, 128 of 1,024" in " ".join(plan_text(plan).split())
    (first, _) = plan_to_json(plan)["experts"]
    assert (first["tokens_each"], first["columns"], first["inputs_kept"]) == (128, 256, True)


def test_products_of_a_solve_from_inputs_are_those_it_makes() -> None:
    rows, columns, tokens = 32, 512, 64
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    total = Accumulator(columns, "full", torch.device("cpu"), keep=True)
    total.add(inputs, 2)
    assert total.statistics().inputs is not None
    for method in ("prox_admm", "sparsegpt"):
        settings = SolverSettings(method=method).resolved()
        solver = solver_for(settings)
        with counting() as counter:
            solver.solve(weight, solver.prepare(total.statistics()))
        counts = solve_counts(settings, rows, columns, 4, "cpu", inputs=tokens)
        one, share = 2 * rows * columns**2, objective_share(columns)
        counted = (counts.products + counts.wide * share) * one + counts.other
        made, factored = counter.get_total_flops(), counts.inverse + counts.factor
        # Factors and triangular solves are not in torch's count.
        assert 0.9 * counted <= made <= 1.1 * (counted + factored), method


# -- overrides, and blocks that stay dense -------------------------------------------------------


def test_an_override_of_all_layers_is_another_method(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    overridden = Plan(planned(model, override="*=wanda", reconstruct="none"))
    asked = Plan(planned(model, method="wanda"))
    assert overridden.seconds == pytest.approx(asked.seconds)
    held = [[phase.peak for _, _, phase in plan.phases()] for plan in (overridden, asked)]
    assert held[0] == held[1]


def test_an_override_of_some_layers_lies_between(tiny_model: TinyModel) -> None:
    model = tiny_model("llama", hidden=256, intermediate=1024, num_attention_heads=8)
    none, some, every = (
        Plan(planned(model, override=text)).totals()["solve"]["seconds"]
        for text in (None, "*.down_proj=wanda", "*=wanda")
    )
    assert every < some < none


@pytest.mark.parametrize(
    "options",
    [
        {"blocks": "2,4"},
        {"dense_first": 1, "dense_last": 2},
        {"blocks": "0,3", "override": "*.down_proj=magnitude"},
        {"method": "magnitude", "override": "*.3.*=dense;*.2.*=wanda"},
    ],
)
def test_phases_are_those_of_a_job(
    tiny_model: TinyModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Blocks between pruned ones are passed, and what follows the last one is never run."""
    model = tiny_model("llama", blocks=6)
    executor = Noted(1)
    prune_here(model, tmp_path / "output", executor=executor, **options)
    plan = Plan(planned(model, **options))
    totals = plan.totals()
    for phase in ("embed", "calibrate", "propagate", "advance", "reduce", "solve"):
        made = executor.phases.count(phase)
        assert totals.get(phase, {"count": 0})["count"] == made, phase
    assert sum(block.count for block in plan.blocks) == 6
    assert math.isfinite(plan.seconds)
    assert max(map(len, plan_text(plan).splitlines())) <= 80
