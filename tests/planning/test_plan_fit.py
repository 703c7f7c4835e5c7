"""A job whose memory cannot suffice is refused before it computes, with what would fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.prune import PruneConfig
from pipeline.loop.rank import Call
from pipeline.messages import Outcome
from pipeline.models.skeleton import open_skeleton
from pipeline.planning.plan import Plan
from pipeline.planning.rates import cpu_rates
from pipeline.planning.shapes.model import read_shape
from pipeline.preflight import memory as fit
from pipeline.preflight.memory import check_memory
from pipeline.runtime.device import FreeMemory
from pipeline.runtime.progress import Silent
from pipeline.worker.local_executor import LocalExecutor
from storage.errors import ResourceError
from tests.planning.test_plan_counts import job_of
from tests.support.jobs import SMALL, check_output, prune_here

TinyModel = Callable[..., Path]
PLENTY = 1e12


class Cramped(LocalExecutor):
    """The local executor on a machine with little memory."""

    def __init__(self, world: int, free: float) -> None:
        super().__init__(world, 1)
        self.free = free
        self.phases: list[str] = []

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        self.phases.append(calls[0].phase)
        outcomes = super().run(calls)
        if calls[0].phase == "free_memory":
            return [replace(o, value=replace(o.value, host=self.free)) for o in outcomes]
        return outcomes


def held(model: Path, **options: Any) -> float:
    """The most bytes of tensors that the plan foresees for a rank."""
    shape = read_shape(model, seqlen=SMALL["seqlen"])
    plan = Plan(job_of(shape, in_process=True, **options))
    return max(p.peak.device + p.peak.host for _, _, p in plan.phases())


def test_what_cannot_fit_is_refused_before_any_phase(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    executor = Cramped(1, 0.9 * held(model, method="wanda", batch_size=8))
    with pytest.raises(ResourceError) as error:
        prune_here(model, tmp_path / "output", executor=executor, method="wanda", batch_size=8)
    assert error.value.exit_code == 2
    message = str(error.value)
    assert "host memory" in message
    assert "--batch-size 4" in message
    assert "--force" in message
    assert executor.phases == ["free_memory"]
    assert not (tmp_path / "output").exists()


def test_force_goes_on(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, output = tiny_model("llama"), tmp_path / "output"
    prune_here(model, output, executor=Cramped(1, 1.0), force=True)
    check_output(model, output)


def test_what_just_fits_is_not_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    prune_here(model, tmp_path / "output", executor=Cramped(1, 1.1 * held(model)))


def test_the_advice_fits(tiny_model: TinyModel) -> None:
    model = tiny_model("llama", hidden=256, intermediate=512, num_attention_heads=8)
    skeleton = open_skeleton(model, dtype=None, trust_remote_code=False)
    config = PruneConfig(executor="ray", dataset="text.txt", **SMALL)
    tight = [FreeMemory("one", 30e6)] * 2
    with pytest.raises(ResourceError, match="node one") as error:
        check_memory(skeleton, config, tight, Silent())
    assert "--workers 1" in str(error.value) or "--method wanda" in str(error.value)
    # Another node, with room, changes nothing for the first; room on both is enough.
    with pytest.raises(ResourceError, match="node one"):
        check_memory(skeleton, config, [*tight, FreeMemory("two", PLENTY)], Silent())
    check_memory(skeleton, config, [FreeMemory("one", PLENTY)] * 2, Silent())


def test_a_gpu_that_two_ranks_share(tiny_model: TinyModel) -> None:
    model = tiny_model("llama", hidden=256, intermediate=512, num_attention_heads=8)
    skeleton = open_skeleton(model, dtype=None, trust_remote_code=False)
    config = PruneConfig(dataset="text.txt", **SMALL)
    alone = FreeMemory("one", PLENTY, "gpu-0", 20e6, 80e9)
    check_memory(skeleton, config, [alone], Silent())
    with pytest.raises(ResourceError, match="GPU gpu-0"):
        check_memory(skeleton, config, [alone] * 3, Silent())
    check_memory(skeleton, config, [replace(alone, gpu=f"gpu-{i}") for i in range(3)], Silent())


def test_no_plan_is_made_where_far_more_is_free(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan was made")

    monkeypatch.setattr(fit, "read_shape", refuse)
    prune_here(tiny_model("llama"), tmp_path / "output", executor=Cramped(1, PLENTY))


def test_the_quick_bound_is_above_the_plan(tiny_model: TinyModel) -> None:
    """So that what it lets through is let through by the plan."""
    for options in ({}, {"hidden": 256, "intermediate": 1024}, {"blocks": 4, "intermediate": 512}):
        model = tiny_model("llama", **options)
        skeleton = open_skeleton(model, dtype=None, trust_remote_code=False)
        shape = read_shape(model, seqlen=512)
        for method in ("magnitude", "wanda", "sparsegpt", "prox", "prox_admm"):
            config = PruneConfig(method=method, nsamples=8, seqlen=512, batch_size=4)
            plan = Plan(job_of(shape, method=method, batch_size=4, rates=cpu_rates()))
            most = max(p.peak.device + p.peak.host for _, _, p in plan.phases())
            assert not fit._surely_fits(skeleton, config, [FreeMemory("one", most)]), (
                options,
                method,
            )
