"""A block's mixture of experts, with every expert's matrices as linear layers of their own.

transformers computes all experts of a block in one module with two parameters of three dimensions.
Here that module is replaced, before any weight is read, by one whose experts are modules: their
linears have names (`mlp.experts.3.gate_proj`), are called with the tokens that the router sends
them, and so are pruned like any other layer. What is computed is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_FIRST = ("gate_proj", "up_proj")
_LAST = "down_proj"


class Expert(nn.Module):
    """One expert: linears `gate_proj` and `up_proj` (R, C) of the same input, and `down_proj`.

    tokens: while the expert is called, which tokens its rows are, (n,) int64 in ascending order;
    None where the rows are all tokens.
    """

    def __init__(self, rows: int, columns: int, like: Tensor, *, gated: bool) -> None:
        """Without weights: on the device and in the dtype of `like`."""
        super().__init__()
        self.tokens: Tensor | None = None
        shapes = dict.fromkeys(_FIRST if gated else _FIRST[1:], (columns, rows))
        for name, (inputs, outputs) in {**shapes, _LAST: (rows, columns)}.items():
            linear = nn.Linear(inputs, outputs, bias=False, device=like.device, dtype=like.dtype)
            self.add_module(name, linear)

    def forward(self, hidden_states: Tensor, activation: nn.Module) -> Tensor:
        """(n, C) -> (n, C); `activation` is the module that knows what comes between."""
        first = [layer(hidden_states) for name, layer in self.named_children() if name != _LAST]
        inner = activation(torch.cat(first, dim=-1))
        output: Tensor = self.get_submodule(_LAST)(inner)
        return output


class Activation(nn.Module):
    """What experts do between their linears: transformers' own module without its weights."""

    def __init__(self, stacked: nn.Module) -> None:
        """`stacked` loses its parameters."""
        super().__init__()
        for name, _ in list(stacked.named_parameters(recurse=False)):
            delattr(stacked, name)
        self.stacked: Any = stacked

    def forward(self, first: Tensor) -> Tensor:
        """Of the first linears' outputs side by side, the last one's input."""
        if getattr(self.stacked, "has_gate", False):
            gated: Tensor = self.stacked._apply_gate(first)
            return gated
        plain: Tensor = self.stacked.act_fn(first)
        return plain


class Experts(nn.Module):
    """All experts of a block, called as the module that they were made from.

    Every expert is called in every forward, with no rows where no token is its own, so that what
    observes its layers sees each of them once.

    every_token: whether each expert computes all tokens, for what observes it; the output is that
    of the routed ones all the same.
    """

    def __init__(self, stacked: nn.Module) -> None:
        """Takes the place of `stacked` (see `is_stacked`), which is used up."""
        super().__init__()
        self.every_token = False
        down = stacked.get_parameter(_LAST)
        self.count, columns, rows = down.shape
        gated = bool(stacked.has_gate)
        for number in range(self.count):
            self.add_module(str(number), Expert(rows, columns, down, gated=gated))
        self.activation = Activation(stacked)

    def __iter__(self) -> Iterator[Expert]:
        for number in range(self.count):
            yield self.get_submodule(str(number))  # type: ignore[misc]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, C), and for each token its experts (tokens, k) and their weights -> (tokens, C).

        The experts' outputs are added in their order, as transformers' plain loop does.
        """
        final = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, position = self.routed(top_k_index, number)
            if self.every_token:
                output = expert(hidden_states, self.activation)[tokens]
            else:
                expert.tokens = tokens
                output = expert(hidden_states[tokens], self.activation)
                expert.tokens = None
            weighted = output * top_k_weights[tokens, position, None]
            final.index_add_(0, tokens, weighted.to(final.dtype))
        return final

    def routed(self, top_k_index: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Which tokens an expert gets, and which of their choices it is: (n,) int64 each.

        In order of the tokens, each at most once: a sum over them depends on no order of rows.
        """
        tokens, position = torch.where(top_k_index == number)
        return tokens, position


def is_stacked(module: nn.Module) -> bool:
    """Whether a module holds a block's experts as transformers 5 stacks them, in the plain layout.

    That is (experts, rows, columns), gate above up, without biases or norms of their own; its
    attributes are what transformers' own kernels for experts go by.
    """
    parameters = dict(module.named_parameters(recurse=False))
    first = "gate_up_proj" if getattr(module, "has_gate", False) else "up_proj"
    if not hasattr(module, "_apply_gate") or set(parameters) != {first, _LAST}:
        return False
    odd = ("has_bias", "is_transposed", "has_post_expert_norm")
    if any(getattr(module, name, False) for name in odd) or not module.is_concatenated:
        return False
    return all(parameter.dim() == 3 for parameter in parameters.values())


def stacked_weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters (experts, R, C) that a module holds of stacked experts, by name; or none."""
    return dict(module.named_parameters(recurse=False)) if is_stacked(module) else {}


def unstack_experts(model: nn.Module) -> None:
    """Replaces every stacked module of experts in a model by `Experts`, in place."""
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if is_stacked(child):
                setattr(owner, name, Experts(child))


def send_every_token(block: nn.Module) -> None:
    """From now on all experts of a block compute every token (see `Experts`)."""
    for module in block.modules():
        if isinstance(module, Experts):
            module.every_token = True


def expert_of(block: nn.Module, layer: str) -> Expert | None:
    """The expert that a layer of a block, by its path, belongs to; None for any other layer."""
    parts = layer.split(".")
    for end in range(len(parts)):
        module = block.get_submodule(".".join(parts[:end]))
        if isinstance(module, Expert):
            return module
    return None


def routers(block: nn.Module) -> set[int]:
    """Ids of the modules of a block that decide how much of which expert a token gets.

    They lie beside the experts and have an output for each, or one for a shared expert. They are
    small, every expert hangs on them, and they stay dense.
    """
    found = set()
    for owner in block.modules():
        counts = {child.count for child in owner.children() if isinstance(child, Experts)}
        if counts:
            for name, child in owner.named_children():
                weight = getattr(child, "weight", None)
                if isinstance(weight, Tensor) and weight.shape[0] in {1, *counts}:
                    found.add(id(child))
                if name == "router":
                    found |= {id(module) for module in child.modules()}
    return found
