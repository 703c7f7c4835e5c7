"""What the model does around and between its blocks, learnt by running the model's own forward.

The blocks of a copy of the model are given another `forward`. So prox24 sees what each block is
called with (masks, rotary tables, positions), what the first block's input is, and what the model
makes of the last block's output, without knowing any architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.models.linears import linear_layers
from pipeline.models.skeleton import Skeleton
from storage.errors import ModelError, first_line


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with besides its hidden states, the same for every batch of a size."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, block: nn.Module, hidden_states: Tensor) -> Tensor:
        """The block's output hidden states; both `(batch, seqlen, hidden)`, forward dtype."""
        output: Any = block(hidden_states, *self.arguments, **self.keywords)
        hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
        return hidden


class _Captured(Exception):
    """Leaves the model's forward once the last block has been called."""


class ModelEnds:
    """Everything of a model but its blocks, on one device, with the calls of every block."""

    def __init__(self, skeleton: Skeleton, device: torch.device, *, head: bool) -> None:
        """Loads embeddings (and with `head` final norm and output embedding) onto `device`."""
        self.model: PreTrainedModel = skeleton.load_ends(device, head=head)
        self.blocks: nn.ModuleList = self.model.get_submodule(skeleton.blocks_path)
        self.device = device
        self.dtype = skeleton.dtype
        self._returns_tuple = False
        self._calls: dict[tuple[int, int], list[BlockCall]] = {}

    def embed(self, tokens: Tensor) -> Tensor:
        """The first block's input `(batch, seqlen, hidden)` for `tokens` `(batch, seqlen)`."""
        hidden_states, _ = self._capture(tokens)
        return hidden_states

    def calls(self, tokens: Tensor) -> list[BlockCall]:
        """What each block is called with, for batches of the shape of `tokens`, int64.

        Raises `ModelError` where a block's arguments depend on the tokens themselves: they could
        then not be replayed for the other batches.
        """
        shape = (tokens.shape[0], tokens.shape[1])
        if shape not in self._calls:
            _, calls = self._capture(tokens)
            _, others = self._capture(tokens.flip(1).roll(1, 1))
            for block, (one, other) in enumerate(zip(calls, others, strict=True)):
                if not _same((one.arguments, one.keywords), (other.arguments, other.keywords)):
                    raise ModelError(
                        f"block {block} of {type(self.model).__name__} is called with arguments "
                        "that depend on the tokens; this architecture is not supported"
                    )
            self._calls[shape] = calls
        return self._calls[shape]

    def logits(self, tokens: Tensor, hidden_states: Tensor) -> Tensor:
        """Logits `(batch, seqlen, vocabulary)` from the last block's output for `tokens`.

        The model's own forward runs, the blocks replaced by the given hidden states, so that final
        norms, projections and scalings are applied whatever they are.
        """
        returns_tuple = self._returns_tuple

        def make(_: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: (hidden_states,) if returns_tuple else hidden_states

        with self._forwards(make):
            logits = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        if not isinstance(logits, Tensor):
            raise ModelError(f"{type(self.model).__name__} returns no logits")
        return logits

    def _capture(self, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """One forward that records every block's call; blocks hand their input through.

        Whether the model expects a block to return a tensor or a tuple is seen from what reaches
        the second block: a model that takes `output[0]` of a tensor drops its first dimension.
        """
        first: list[Tensor] = []
        calls: list[BlockCall] = []

        def make(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden_states, rest, keywords = _split(args, kwargs)
                if index == 0:
                    first.append(hidden_states)
                elif getattr(hidden_states, "shape", None) != first[0].shape:
                    raise _WrongReturn("a block is not called with what the one before returns")
                elif hidden_states is not first[0] and not torch.equal(hidden_states, first[0]):
                    raise ModelError(
                        f"{type(self.model).__name__} changes the hidden states between blocks "
                        f"{index - 1} and {index}; this architecture is not supported"
                    )
                calls.append(BlockCall(rest, keywords))
                if index == len(self.blocks) - 1:
                    raise _Captured
                return (hidden_states,) if self._returns_tuple else hidden_states

            return forward

        try:
            with self._forwards(make):
                self.model(input_ids=tokens.to(self.device), use_cache=False)
        except _Captured:
            return first[0], calls
        except (_WrongReturn, IndexError, TypeError, ValueError, RuntimeError) as error:
            if not self._returns_tuple and first:
                self._returns_tuple = True
                return self._capture(tokens)
            raise ModelError(
                f"the blocks of {type(self.model).__name__} cannot be run one at a time: "
                f"{first_line(error)}"
            ) from error
        raise ModelError(f"{type(self.model).__name__} does not run all of its blocks in order")

    @contextmanager
    def _forwards(self, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Gives each block another `forward` while inside.

        Taken off again: they refer to this object, and the cycle would keep the embeddings alive
        until the garbage collector runs.
        """
        for index, block in enumerate(self.blocks):
            block.forward = make(index)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward


class _WrongReturn(Exception):
    """The hidden states changed shape between two blocks that handed them through."""


def _split(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """A block call's hidden states, its other positional arguments, and its keywords."""
    if args:
        return args[0], tuple(args[1:]), dict(kwargs)
    keywords = dict(kwargs)
    return keywords.pop("hidden_states"), (), keywords


def _same(one: Any, other: Any) -> bool:
    """Whether two nested structures of tensors and plain values are equal."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and (one is other or bool(one == other))


@dataclass(frozen=True)
class LayerGroup:
    """Linear layers of a block that are always called with the same input tensor.

    `layers` are module paths inside the block (`self_attn.q_proj`), in module order; `columns` is
    the width of their input, `calls` how often a forward calls each of them.
    """

    layers: tuple[str, ...]
    columns: int
    calls: int = 1

    @property
    def name(self) -> str:
        """The group's name in files and reports: its first layer's."""
        return self.layers[0]


@torch.no_grad()
def find_groups(
    block: nn.Module, call: BlockCall, hidden_states: Tensor, layers: tuple[str, ...]
) -> tuple[LayerGroup, ...]:
    """Groups `layers` of a block by the input tensor that one forward hands to each.

    `hidden_states` is `(batch, seqlen, hidden)`. Inputs are the same when they are the same view of
    the same memory; they are kept until the end of this one forward, or a freed input's address
    could be taken by another. Raises `ModelError` for a layer that the forward never calls.
    """
    seen: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    handles = [
        block.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: seen[layer].append(
                args[0] if args else kwargs["input"]
            ),
            with_kwargs=True,
        )
        for layer in layers
    ]
    try:
        call.run(block, hidden_states)
    finally:
        for handle in handles:
            handle.remove()
    columns = {name: shape[1] for name, shape in linear_layers(block).items()}
    groups: dict[tuple[tuple[Any, ...], ...], list[str]] = {}
    for layer, inputs in seen.items():
        if not inputs:
            raise ModelError(f"{layer} is a linear layer that its block's forward never calls")
        # A tensor without rows has no memory: an expert that no token was sent to.
        key = tuple((x.data_ptr() if x.numel() else id(x), x.shape, x.stride()) for x in inputs)
        groups.setdefault(key, []).append(layer)
    return tuple(
        LayerGroup(tuple(names), columns[names[0]], len(key)) for key, names in groups.items()
    )
