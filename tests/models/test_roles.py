"""What weights are for is read from what a forward does with them, whatever their names are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.experts import Expert, Experts
from pipeline.models.linears import dense_weights, linear_layers, unsupported_parameters
from pipeline.models.roles.block_roles import (
    DEPTHWISE,
    ELEMENTWISE,
    NEVER_CALLED,
    ROUTER,
    SHARED_GATE,
    SMALL,
    roles_of,
)

HIDDEN, EXPERTS = 16, 4


def experts() -> Experts:
    """A block's experts, as they are when they have been taken apart."""
    made: Any = Experts.__new__(Experts)
    nn.Module.__init__(made)
    made.count, made.transposed, made.every_token = EXPERTS, False, False
    like = torch.empty(1)
    for number in range(EXPERTS):
        made.add_module(str(number), Expert({"up_proj": (8, HIDDEN)}, like, bias=False))
    found: Experts = made
    return found


class Mixture(nn.Module):
    """A mixture whose router's names say nothing, with layers as wide as the number of experts."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.first, self.experts = router, experts()
        # As wide as there are experts, but it chooses none.
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.back = nn.Linear(EXPERTS, HIDDEN)
        self.alpha = nn.Linear(HIDDEN, 1)
        self.shared = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(-1, HIDDEN)
        weights, chosen = torch.topk(self.first(rows).softmax(-1), 2)
        shared = self.shared(rows) * self.alpha(rows).sigmoid() + self.back(self.gate(rows))
        mixed: Tensor = self.experts(rows, chosen, weights)
        return (mixed + shared).view(hidden_states.shape)


class Deep(nn.Module):
    """A router of two layers, the second a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(HIDDEN, 8)
        self.weight = nn.Parameter(torch.empty(EXPERTS + 1, 8))

    def forward(self, rows: Tensor) -> Tensor:
        return functional.linear(self.inner(rows).relu(), self.weight)[:, :EXPERTS]


class Block(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


@pytest.mark.parametrize(
    ("router", "names"),
    [
        (nn.Linear(HIDDEN, EXPERTS), {"mlp.first"}),
        (nn.Sequential(nn.Identity(), nn.Linear(HIDDEN, EXPERTS)), {"mlp.first.1"}),
        (Deep(), {"mlp.first.inner", "mlp.first.weight"}),
    ],
)
def test_a_router_is_what_chooses_the_experts(router: nn.Module, names: set[str]) -> None:
    block = Block(mlp=Mixture(router))
    dense = dense_weights(block)
    assert {name for name, why in dense.items() if why == ROUTER} == names
    assert {name for name, why in dense.items() if why == SHARED_GATE} == {"mlp.alpha"}
    assert unsupported_parameters(block) == []
    pruned = linear_layers(block)
    assert {"mlp.gate", "mlp.back", "mlp.shared"} <= pruned.keys()
    assert len(pruned) == 3 + EXPERTS


def test_a_list_of_experts_is_refused_whatever_its_name() -> None:
    mlps = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))
    choice = nn.Sequential(nn.Linear(HIDDEN, EXPERTS))
    refused = roles_of(Block(mlp=Block(mlps=mlps, choice=choice))).refused
    assert "only some tokens reach" in refused["mlp.mlps"]
    assert roles_of(Block(mlp=Block(mlps=mlps))).refused == {}


class Closed(Mixture):
    """Its forward cannot be run with hidden states alone."""

    def forward(self, hidden_states: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states) + table


def test_a_mixture_that_cannot_be_looked_at() -> None:
    """Of two layers of the right width the name decides; without one the block is refused."""
    block = Block(mlp=Closed(nn.Linear(HIDDEN, EXPERTS)))
    assert roles_of(block).layers == {"mlp.gate": ROUTER, "mlp.alpha": SHARED_GATE}
    mixture = Closed(nn.Linear(HIDDEN, EXPERTS + 3))
    del mixture.gate
    refused = roles_of(Block(mlp=mixture)).refused
    assert "cannot tell what chooses the experts" in refused["mlp.experts"]


class Mixer(nn.Module):
    """A state-space layer's parts, without its sense."""

    def __init__(self) -> None:
        super().__init__()
        self.enters, self.leaves = nn.Linear(HIDDEN, 32), nn.Linear(32, HIDDEN)
        self.step = nn.Linear(32, 32)
        self.conv = nn.Conv1d(32, 32, 4, groups=32, padding=3)
        self.decay = nn.Parameter(torch.empty(32, 8))
        self.scale = nn.Parameter(torch.empty(4, 8))

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self.enters(hidden_states)
        inner = self.conv(inner.mT)[..., : inner.shape[1]]
        inner = self.step.weight @ inner
        inner = inner * (-self.decay.exp()).sum(dim=1, keepdim=True) * self.scale.view(-1, 1)
        return self.leaves(inner.mT)  # type: ignore[no-any-return]


def test_a_mixers_parts() -> None:
    roles = roles_of(Block(mixer=Mixer()))
    assert roles.layers == {"mixer.step": NEVER_CALLED}
    assert roles.parameters == {
        "mixer.conv.weight": DEPTHWISE,
        "mixer.decay": ELEMENTWISE,
        "mixer.scale": SMALL,
    }
    assert roles.refused == {}


class Bare(nn.Module):
    """A projection that is a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.matrix = nn.Parameter(torch.empty(HIDDEN, HIDDEN))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.out(hidden_states @ self.matrix)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("part", "name", "words"),
    [
        (Bare(), "part.matrix", "(16 × 16, 256 weights) is multiplied as a matrix"),
        (
            nn.Conv1d(HIDDEN, HIDDEN, 4),
            "part.weight",
            "(16 × 16 × 4, 1,024 weights) is a convolution that mixes channels",
        ),
        (
            nn.Conv1d(HIDDEN, HIDDEN, 4, groups=2),
            "part.weight",
            "is a convolution that mixes channels",
        ),
        (nn.GRU(HIDDEN, HIDDEN), "part.weight_ih_l0", "is a recurrent matrix"),
        (nn.Embedding(99, HIDDEN), "part.weight", "(99 × 16, 1,584 weights) is a table"),
    ],
)
def test_what_is_large_and_no_linear_layer_is_refused(
    part: nn.Module, name: str, words: str
) -> None:
    assert words in roles_of(Block(part=part, linear=nn.Linear(HIDDEN, HIDDEN))).refused[name]


def test_roles_are_looked_at_without_data_and_kept() -> None:
    block = Block(mixer=Mixer())
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    assert roles_of(block) is roles_of(block)
    assert roles_of(block.to("meta")) == roles_of(Block(mixer=Mixer()))
    assert before.keys() == dict(block.named_parameters()).keys()
