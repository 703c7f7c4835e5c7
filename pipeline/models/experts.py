"""A block's mixture of experts, with every expert's matrices as linear layers of their own.

transformers computes all experts of a block in one module with two parameters of three dimensions.
Here that module is replaced, before any weight is read, by one whose experts are modules: their
linears have names (`mlp.experts.3.gate_proj`), are called with the tokens that the router sends
them, and so are pruned like any other layer. What is computed is the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_LAST = "down_proj"
_BIAS = "_bias"


class Expert(nn.Module):
    """One expert: linears of the same input, and `down_proj`, each (R, C).

    The first are `gate_proj` and `up_proj`, or both in one, `gate_up_proj`; without a gate
    `up_proj` alone.
    tokens: while the expert is called, which tokens its rows are, (n,) int64 in ascending order;
    None where the rows are all tokens.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]], like: Tensor, *, bias: bool) -> None:
        """`shapes` (R, C) by name; without weights, on the device and in the dtype of `like`."""
        super().__init__()
        self.tokens: Tensor | None = None
        for name, (rows, columns) in shapes.items():
            linear = nn.Linear(columns, rows, bias=bias, device=like.device, dtype=like.dtype)
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
        if _is_scored(self.stacked):
            gate, up = first.chunk(2, dim=-1)
            scored: Tensor = up * self.stacked.act_fn(gate)
            return scored
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
    transposed: whether the module that it was made from holds the experts' weights as (C, R).
    """

    def __init__(self, stacked: nn.Module, *, together: bool = False) -> None:
        """Takes the place of `stacked` (see `is_stacked`), which is used up.

        together: whether gate and up are one layer, because the weight files have them in one
        tensor. Where they are interleaved or transposed they are anyway.
        """
        super().__init__()
        self.every_token = False
        first, last = stacked_weights(stacked).items()
        (name, (self.count, rows, columns)), like = (first[0], first[1].shape), last[1]
        self.transposed = holds_transposed(stacked)
        shapes = {name: (rows, columns), _LAST: (last[1].shape[1], last[1].shape[2])}
        bias, plain = getattr(stacked, "has_bias", False), _is_plain(stacked)
        if name == "gate_up_proj" and plain and not together:
            half = (rows // 2, columns)
            shapes = {"gate_proj": half, "up_proj": half, _LAST: shapes[_LAST]}
        for number in range(self.count):
            self.add_module(str(number), Expert(shapes, like, bias=bias))
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
            output = self._called(expert, hidden_states, tokens)
            weighted = output * top_k_weights[tokens, position, None]
            final.index_add_(0, tokens, weighted.to(final.dtype))
        return final

    def routed(self, top_k_index: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Which tokens an expert gets, and which of their choices it is: (n,) int64 each.

        In order of the tokens, each at most once: a sum over them depends on no order of rows.
        """
        tokens, position = torch.where(top_k_index == number)
        return tokens, position

    def _called(
        self, expert: Expert, hidden_states: Tensor, tokens: Tensor, scores: Tensor | None = None
    ) -> Tensor:
        """An expert's outputs for `tokens` of (T, C); its inputs scaled by `scores` (T, 1)."""
        if not self.every_token:
            hidden_states = hidden_states[tokens]
            scores = None if scores is None else scores[tokens]
            expert.tokens = tokens
        if scores is not None:
            hidden_states = hidden_states * scores
        output: Tensor = expert(hidden_states, self.activation)
        expert.tokens = None
        return output[tokens] if self.every_token else output


class ScoredExperts(Experts):
    """Experts whose inputs are scaled by the router's scores, and whose outputs are added as such.

    Where every expert computes all tokens, each is scaled by the score that it would have had.
    """

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, scores: Tensor) -> Tensor:
        """(T, C), and for each token its experts (T, k) and all scores (T, experts) -> (T, C)."""
        final = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, _ = self.routed(top_k_index, number)
            output = self._called(expert, hidden_states, tokens, scores[:, number, None])
            final.index_add_(0, tokens, output)
        return final


class ScoredMixture(nn.Module):
    """Llama 4's mixture, called as transformers' own, which runs all tokens through all experts.

    There the tokens that an expert is not sent are multiplied by zero, and only they: what they add
    to the output and to the statistics is zero, so they are left out here.
    """

    def __init__(self, mixture: Any, *, together: bool = False) -> None:
        """Takes the place of `mixture`, whose experts are used up."""
        super().__init__()
        self.experts = ScoredExperts(mixture.experts, together=together)
        self.router = mixture.router
        self.shared_expert = mixture.shared_expert

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(..., C) -> (tokens, C), and the router's logits (tokens, experts)."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits: Tensor = self.router(rows)[1]
        chosen = torch.topk(logits, self.router.top_k, dim=1).indices
        scores = torch.sigmoid(logits.float()).to(logits.dtype)
        output: Tensor = self.shared_expert(rows)
        return output + self.experts(rows, chosen, scores), logits


def is_stacked(module: nn.Module) -> bool:
    """Whether a module holds a block's experts in parameters that are taken apart here.

    They are (experts, rows, columns), or transposed with `is_transposed`, perhaps with biases
    (experts, rows), without norms of their own; the attributes are what transformers' own kernels
    for experts go by. Llama 4's have none, and are known by their class.
    """
    parameters = dict(module.named_parameters(recurse=False))
    weights = {"gate_up_proj", _LAST}
    if not _is_scored(module):
        # Only versions of transformers that know such norms say whether there are any.
        if not hasattr(module, "_apply_gate") or getattr(module, "has_post_expert_norm", False):
            return False
        weights = {"gate_up_proj" if module.has_gate else "up_proj", _LAST}
    biases = {name + _BIAS for name in weights} if getattr(module, "has_bias", False) else set()
    return set(parameters) == weights | biases and all(
        parameter.dim() == (2 if name in biases else 3) for name, parameter in parameters.items()
    )


def _is_scored(module: nn.Module) -> bool:
    """Whether a module has Llama 4's experts, called with all tokens scaled."""
    return type(module).__name__ == "Llama4TextExperts" and not hasattr(module, "_apply_gate")


def holds_transposed(stacked: nn.Module) -> bool:
    """Whether a stacked module holds the experts' weights as (experts, C, R)."""
    return _is_scored(stacked) or bool(getattr(stacked, "is_transposed", False))


def _is_plain(stacked: Any) -> bool:
    """Whether gate and up of an expert are the halves of its rows, and may be layers apart."""
    return not holds_transposed(stacked) and not stacked.has_bias and stacked.is_concatenated


def stacked_weights(module: nn.Module) -> dict[str, Tensor]:
    """Views (experts, R, C) of what a module holds of stacked experts, by name; or none."""
    if not is_stacked(module):
        return {}
    held = dict(module.named_parameters(recurse=False))
    first = next(name for name in ("gate_up_proj", "up_proj") if name in held)
    transposed = holds_transposed(module)
    return {name: held[name].mT if transposed else held[name] for name in (first, _LAST)}


def unstack_experts(model: nn.Module, together: Collection[str] = ()) -> None:
    """Replaces every stacked module of experts in a model by `Experts`, in place.

    together: paths of those whose gate and up are one layer.
    """
    for path, owner in list(model.named_modules()):
        for name, child in list(owner.named_children()):
            own = f"{path}.{name}".lstrip(".")
            experts = getattr(child, "experts", None)
            if is_stacked(child) and not _is_scored(child):
                setattr(owner, name, Experts(child, together=own in together))
            elif isinstance(experts, nn.Module) and _is_scored(experts) and is_stacked(experts):
                setattr(owner, name, ScoredMixture(child))


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
