"""Which weights a module's outputs come from, followed through a forward without data.

The module's own code runs on the meta device. Every operator is seen with its tensors: so it is
known which weight a matrix product takes, whatever holds the weight and whatever its name is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
_PRODUCTS = frozenset({
    "linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "inner",
    "addmm", "addbmm", "addmv", "baddbmm", "einsum", "tensordot", "chain_matmul", "grouped_mm",
    "_grouped_mm", "scaled_mm", "_scaled_mm", "conv1d", "conv2d", "conv3d", "conv_transpose1d",
    "lstm", "gru", "rnn_tanh", "rnn_relu",
})  # fmt: skip
_LOOKUPS = frozenset({"embedding", "embedding_bag"})
_TOKENS = 8


@dataclass
class Use:
    """What a forward did. products, lookups, others: names of the parameters that a matrix
    product, a lookup, any other operator took. called: modules, by path, that were called.
    finished: whether the forward came to its end."""

    products: set[str] = field(default_factory=set)
    lookups: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    finished: bool = False


class Flow(TorchFunctionMode):
    """Follows tensors: `sources` has, by a tensor's id, the names of all weights that it was
    computed with; `own` those that it is a copy or a view of."""

    def __init__(self, module: nn.Module, use: Use) -> None:
        super().__init__()
        self.use = use
        self.own: dict[int, frozenset[str]] = {
            id(parameter): frozenset({name}) for name, parameter in module.named_parameters()
        }
        self.sources: dict[int, frozenset[str]] = {}
        self._alive: list[Tensor] = []  # or the id of a freed tensor could be taken by another

    def of(self, value: Any) -> frozenset[str]:
        """Names of the weights that a structure of tensors was computed with."""
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        return frozenset().union(*(self.sources.get(id(leaf), frozenset()) for leaf in leaves))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        held = [self.own.get(id(leaf), frozenset()) for leaf in given]
        weights: frozenset[str] = frozenset().union(*held)
        sources = weights | self.of(given)
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        alone = bool(given) and all(held)  # a view, a copy or a function of weights
        if name in _PRODUCTS:
            self.use.products |= weights
        elif name in _LOOKUPS:
            self.use.lookups |= weights
        elif not alone:
            self.use.others |= weights
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._alive.append(leaf)
                self.sources[id(leaf)] = sources
                if alone and name not in _PRODUCTS:
                    self.own[id(leaf)] = weights
        return output


def hollow(module: nn.Module, instead: Mapping[int, nn.Module]) -> nn.Module:
    """A copy of a module without data; `instead`: by id, what takes the place of parts of it."""
    memo: dict[int, Any] = dict(instead)
    for part in _parts(module, instead):
        for held in (part._parameters, part._buffers):
            for tensor in held.values():
                if tensor is None or id(tensor) in memo:
                    continue
                empty = torch.empty_like(tensor, device=META)
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(empty, False) if is_parameter else empty
    return copy.deepcopy(module, memo).eval()


def _parts(module: nn.Module, without: Mapping[int, nn.Module]) -> Iterator[nn.Module]:
    """A module and all in it, but for those `without`, by id, and what is in them."""
    if id(module) not in without:
        yield module
        for child in module.children():
            yield from _parts(child, without)


@torch.no_grad()
def follow(module: nn.Module, width: int, use: Use, *, flow: Flow | None = None) -> Use:
    """Runs a `hollow` module on hidden states (1, tokens, width); `use` is filled.

    A module that takes more than hidden states, or looks at values, ends early: then `use` has what
    was seen until there, and is not `finished`.
    """
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    hidden_states = torch.empty((1, _TOKENS, width), dtype=dtype, device=META)
    handles = [
        part.register_forward_pre_hook(lambda *_, path=path: use.called.add(path))
        for path, part in module.named_modules()
    ]
    try:
        with flow or Flow(module, use):
            module(hidden_states)
        use.finished = True
    except Exception:  # whatever code makes of tensors without data
        pass
    finally:
        for handle in handles:
            handle.remove()
    return use
