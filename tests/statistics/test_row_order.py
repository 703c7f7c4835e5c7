"""Layers whose inputs are not the tokens in their order are found by what their blocks do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pipeline.models.experts import unstack_experts
from pipeline.models.forward_capture import BlockCall, LayerGroup, find_groups
from pipeline.models.linears import linear_layers
from pipeline.runtime.stopwatch import Stopwatch
from pipeline.statistics.accumulate import GroupAccumulator, Sums
from pipeline.statistics.observer import BlockObserver
from pipeline.statistics.row_order import check_rows
from storage.errors import ModelError
from tests.support.moe_models import EXPERTS, moe_config
from tests.support.moe_models import HIDDEN as HIDDEN_OF_EXPERTS

HIDDEN = 8
Forward = Callable[[nn.Module, Tensor], Tensor]


class Block(nn.Module):
    """A layer behind a causal mean, called as `forward` does."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.layer, self.called = nn.Linear(HIDDEN, HIDDEN), forward

    def forward(self, hidden_states: Tensor) -> Tensor:
        steps = torch.arange(1, hidden_states.shape[1] + 1)[None, :, None]
        return self.called(self.layer, hidden_states.cumsum(1) / steps).reshape(hidden_states.shape)


def in_place(layer: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = layer(x)
    return x.mul_(0).add_(output)


def per_sequence(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([layer(sequence[None])[0] for sequence in x])


def twice(layer: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = layer(layer(x))
    return output


def heads(layer: nn.Module, x: Tensor) -> Tensor:
    """(n, heads, seqlen, C), of as many heads as sequences."""
    each = x[:, None].expand(-1, x.shape[0], -1, -1)
    return layer(each)[:, 0].contiguous()


IN_ORDER: dict[str, Forward] = {
    "as they are": lambda layer, x: layer(x),
    "flat": lambda layer, x: layer(x.flatten(0, 1)),
    "one head": lambda layer, x: layer(x[:, None]),
    "twice": twice,
    "in place": in_place,
}
IN_ANOTHER: dict[str, tuple[Forward, str]] = {
    "sequences last": (lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1), "the order"),
    "flat, sequences last": (
        lambda layer, x: layer(x.transpose(0, 1).flatten(0, 1)).view(*x.shape[1::-1], -1).mT.mT,
        "the order",
    ),
    "sequences backwards": (lambda layer, x: layer(x.flip(0)).flip(0), "the order"),
    "tokens backwards": (lambda layer, x: layer(x.flip(1)).flip(1), "the order"),
    "heads": (heads, r"\d+ inputs for \d+ tokens"),
    "sequence by sequence": (per_sequence, r"\d+ inputs for \d+ tokens"),
    "every other token": (
        lambda layer, x: x + layer(x[:, ::2]).mean(),
        r"\d+ inputs for \d+ tokens",
    ),
    "no tokens at all": (lambda layer, x: x + layer(torch.ones_like(x)), "the order"),
}
# More tokens than sequences, as many, and an odd number of sequences.
SHAPES = ((2, 6), (4, 4), (3, 5))


def states(sequences: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sequences, length, HIDDEN, generator=generator)


def checked(block: nn.Module, hidden_states: Tensor) -> tuple[LayerGroup, ...]:
    call = BlockCall((), {})
    groups = find_groups(block, call, hidden_states.clone(), tuple(linear_layers(block)))
    check_rows(block, call, hidden_states, groups)
    return groups


@pytest.mark.parametrize("shape", [*SHAPES, (1, 6)])
@pytest.mark.parametrize("called", IN_ORDER)
def test_layers_called_with_the_tokens_pass(called: str, shape: tuple[int, int]) -> None:
    hidden_states = states(*shape)
    before = hidden_states.clone()
    assert checked(Block(IN_ORDER[called]), hidden_states)
    assert torch.equal(hidden_states, before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("called", IN_ANOTHER)
def test_other_layers_are_named(called: str, shape: tuple[int, int]) -> None:
    forward, why = IN_ANOTHER[called]
    with pytest.raises(ModelError, match=rf"^layer: .*{why}.*--exclude.*--calibrate-on all"):
        checked(Block(forward), states(*shape))


class Swapped(nn.Module):
    """A mixture of experts, called with the sequences last or as they are."""

    def __init__(self, *, swapped: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(moe_config("mixtral")).eval()
        self.mlp, self.swapped = model.model.layers[0].mlp, swapped
        unstack_experts(self)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn_like(parameter))

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = (
            self.mlp(hidden_states.transpose(0, 1).contiguous()).transpose(0, 1)
            if self.swapped
            else self.mlp(hidden_states)
        )
        return output


@pytest.mark.parametrize("swapped", [False, True])
def test_a_mixture_is_checked_by_what_its_experts_are_called_with(swapped: bool) -> None:
    block = Swapped(swapped=swapped)
    hidden_states = torch.randn(4, 6, HIDDEN_OF_EXPERTS, generator=torch.Generator())
    if not swapped:
        assert len(checked(block, hidden_states)) == 2 * EXPERTS
        return
    with pytest.raises(ModelError, match=r"^mlp\.experts: .*the order"):
        checked(block, hidden_states)


# -- the sums -------------------------------------------------------------------------------------


def sums_of(block: nn.Module, hidden_states: Tensor, counted: Tensor) -> Sums:
    call = BlockCall((), {})
    (group,) = find_groups(block, call, hidden_states.clone(), ("layer",))
    total = GroupAccumulator(HIDDEN, "full", torch.device("cpu"), None)
    observer = BlockObserver(
        block, {group: total}, lambda _: call, Stopwatch(torch.device("cpu")), counted
    )
    observer.add(0, hidden_states)
    (sums,) = observer.sums()["layer"]
    return sums


@torch.no_grad()
def test_each_call_of_a_layer_adds_the_tokens_that_count() -> None:
    hidden_states, counted = states(3, 5), torch.zeros(3, 5, dtype=torch.bool)
    counted[1, 2:4] = True
    seen: list[Tensor] = []
    block = Block(twice)
    handle = block.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block(hidden_states)
    handle.remove()
    sums = sums_of(block, hidden_states, counted)
    assert (sums.tokens, len(seen)) == (4, 2)
    rows = torch.cat([x[counted] for x in seen]).double()
    hessian = sums.statistics().hessian
    assert hessian is not None
    torch.testing.assert_close(hessian.double(), rows.T @ rows, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_inputs_that_are_not_one_for_each_token_are_never_chosen_from() -> None:
    """Also where a later batch's are, whose rows are not checked."""
    counted = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(ModelError, match=r"^layer: it has 64 inputs for 16 tokens; use --calib"):
        sums_of(Block(heads), states(4, 4), counted)
