"""One pass over a block's inputs gives what two give, and stops where nothing is left to see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.loop.rank import Call, Rank, call
from pipeline.messages import Advanced, Outcome
from pipeline.models.forward_capture import BlockCall, ModelEnds, find_groups, linear_layers
from pipeline.models.skeleton import open_skeleton
from pipeline.runtime.stopwatch import Stopwatch
from pipeline.solvers.types import Statistics
from pipeline.statistics.accumulate import GroupAccumulator
from pipeline.statistics.observer import BlockObserver
from pipeline.worker.local_executor import LocalExecutor
from tests.support.jobs import contents, prune_here
from tests.support.tiny_models import ARCHITECTURES

TinyModel = Callable[..., Path]
CPU = torch.device("cpu")


class Recording(LocalExecutor):
    """Keeps the statistics that the ranks hold when they are summed."""

    def __init__(self, world: int, *, one_pass: bool) -> None:
        super().__init__(world, 1)
        self.one_pass = one_pass
        self.phases: list[str] = []
        self.seen: list[dict[str, tuple[Statistics, ...]]] = []

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        self.phases.append(calls[0].phase)
        if calls[0].phase == "advance" and not self.one_pass:
            return self._in_two_passes(calls)
        return super().run(calls)

    def reduce(self) -> list[Outcome]:
        self.seen += [
            {
                name: tuple(f.statistics() for f in halves)
                for name, halves in worker.state.sums.items()
            }
            for worker in self._workers
        ]
        return super().reduce()

    def _in_two_passes(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        """What `advance` promises, the plain way: all of the store is written, then read."""
        written: list[Outcome[Any]] = super().run(
            [call(Rank.propagate, *each.arguments[:4]) for each in calls]
        )
        shards = [shard for outcome in written for shard in outcome.value]
        block = calls[0].block
        assert block is not None
        groups = super().run([call(Rank.calibrate, block + 1, shards, None, 0)] * self.world)
        for outcome, own in zip(written, groups, strict=True):
            object.__setattr__(outcome, "value", Advanced(outcome.value, own.value))
        return written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_one_pass_sees_the_bytes_of_two(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    model = tiny_model(architecture, blocks=3, dtype=dtype)
    one, two = Recording(2, one_pass=True), Recording(2, one_pass=False)
    options = {"workers": 2, "nsamples": 10}
    first = prune_here(model, tmp_path / "one", executor=one, **options)
    second = prune_here(model, tmp_path / "two", executor=two, **options)
    assert one.phases.count("advance") == two.phases.count("advance") == 2
    assert one.phases.count("calibrate") == 1
    assert len(one.seen) == len(two.seen) == 6
    for own, other in zip(one.seen, two.seen, strict=True):
        assert own.keys() == other.keys()
        for name, (statistics,) in own.items():
            (expected,) = other[name]
            assert (statistics.tokens, statistics.sequences) == (
                expected.tokens,
                expected.sequences,
            )
            assert statistics.hessian is not None
            assert expected.hessian is not None
            assert torch.equal(statistics.hessian, expected.hessian), name
    weights = [
        {name: data for name, data in contents(result.output).items() if "safetensors" in name}
        for result in (first, second)
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("options", [{}, {"shrinkage": "auto"}, {"method": "wanda"}])
def test_groups_taken_in_turns_are_pruned_the_same(
    tiny_model: TinyModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = tiny_model("llama", blocks=2)
    once, often = Recording(2, one_pass=True), Recording(2, one_pass=True)
    prune_here(model, tmp_path / "once", executor=once, workers=2, **options)
    # 32 columns in fp32 are 4 kB a matrix: two groups of three fit, down_proj's 64 columns do not.
    limit = (
        {"hessian_memory": 8.5e-6} if options.get("method") != "wanda" else {"hessian_memory": 0}
    )
    prune_here(model, tmp_path / "often", executor=often, workers=2, **options, **limit)
    expected, found = contents(tmp_path / "once"), contents(tmp_path / "often")
    weights = [name for name in expected if name.endswith(".safetensors")]
    assert all(found[name] == expected[name] for name in weights)
    assert often.phases.count("solve") > 2 == once.phases.count("solve")
    passes = often.phases.count("calibrate") + often.phases.count("advance")
    assert passes == often.phases.count("solve")
    most = max(len(held) for held in once.seen)
    assert most == 4
    assert max(len(held) for held in often.seen) < most


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_forward_ends_at_the_last_groups_input(tiny_model: TinyModel, architecture: str) -> None:
    skeleton = open_skeleton(tiny_model(architecture), dtype=None, trust_remote_code=False)
    ends = ModelEnds(skeleton, CPU, head=False)
    tokens = torch.arange(48).reshape(2, 24)
    call, hidden_states = ends.calls(tokens)[1], ends.embed(tokens)
    module = skeleton.load_block(1, CPU)
    layers = tuple(linear_layers(module))
    groups = find_groups(module, call, hidden_states, layers)
    assert {group.calls for group in groups} == {1}
    expected = {group: _inputs(module, group.name, call, hidden_states) for group in groups}

    ran: list[str] = []
    for name in layers:
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    sums = {group: GroupAccumulator(group.columns, "full", CPU, None) for group in groups}
    observer = BlockObserver(module, sums, lambda _: call, Stopwatch(CPU))
    observer.add(0, hidden_states)
    found = observer.sums()
    assert set(ran) == set(layers) - set(groups[-1].layers)
    for group in groups:
        (sums,) = found[group.name]
        statistics = sums.statistics()
        x = expected[group].reshape(-1, group.columns).double()
        assert statistics.tokens == x.shape[0]
        assert statistics.hessian is not None
        torch.testing.assert_close(statistics.hessian.double(), x.T @ x, rtol=1e-5, atol=1e-4)
    ran.clear()
    call.run(module, hidden_states)
    assert set(ran) == set(layers), "the block is whole again once the observation has ended"


class Twice(nn.Module):
    """Calls one layer twice: where its second call is not waited for, half of it is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.second(self.first(self.first(hidden_states)))
        return output


@torch.no_grad()
def test_a_layer_called_twice_is_seen_twice() -> None:
    module, call, x = Twice(), BlockCall((), {}), torch.randn(2, 3, 8)
    groups = find_groups(module, call, x, ("first", "second"))
    assert {group.name: group.calls for group in groups} == {"first": 2, "second": 1}
    sums = {group: GroupAccumulator(8, "full", CPU, None) for group in groups}
    observer = BlockObserver(module, sums, lambda _: call, Stopwatch(CPU))
    observer.add(0, x)
    found = observer.sums()
    assert {name: s.tokens for name, (s,) in found.items()} == {"first": 12, "second": 6}


def _inputs(module: nn.Module, layer: str, call: Any, hidden_states: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = module.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    call.run(module, hidden_states)
    handle.remove()
    return seen[0]
