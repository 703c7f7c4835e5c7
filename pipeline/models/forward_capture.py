"""What the model does around and between its blocks, learnt by running the model's own forward.

The blocks of a copy of the model are given another `forward`. So prox24 sees what each block is
called with (masks, rotary tables, positions), what the first block's input is, and what the model
makes of the last block's output, without knowing any architecture. How the forward goes through the
blocks, and in what form it takes their outputs, has been seen by `text_forward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.models.linears import linear_layers
from pipeline.models.skeleton import Skeleton
from pipeline.models.text_forward import (
    Arguments,
    Leave,
    TextForward,
    Visit,
    blocks_of,
    run_replaced,
    same_arguments,
    text_forward,
)
from pipeline.runtime.device_errors import is_out_of_memory
from pipeline.runtime.products import InPieces
from storage.errors import ModelError, first_line


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with besides its hidden states, the same for every batch of a size.

    passed_by: whether the forward does not call the block at all.
    """

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    passed_by: bool = False

    def run(self, block: nn.Module, hidden_states: Tensor) -> Tensor:
        """The block's output hidden states; both `(batch, seqlen, hidden)`, forward dtype."""
        if self.passed_by:
            return hidden_states
        with InPieces():
            output: Any = block(hidden_states, *self.arguments, **self.keywords)
        hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
        return hidden


class ModelEnds:
    """Everything of a model but its blocks, on one device, with the calls of every block.

    Every method raises `ModelError` where `text_forward` does.
    """

    def __init__(self, skeleton: Skeleton, device: torch.device, *, head: bool) -> None:
        """Loads embeddings (and with `head` final norm and output embedding) onto `device`."""
        self.model: PreTrainedModel = skeleton.load_ends(device, head=head)
        self.device = device
        self.dtype = skeleton.dtype
        self._skeleton = skeleton
        self._blocks = blocks_of(self.model, skeleton.blocks_path)
        self._calls: dict[tuple[int, int], list[BlockCall]] = {}

    def embed(self, tokens: Tensor) -> Tensor:
        """The first block's input `(batch, seqlen, hidden)` for `tokens` `(batch, seqlen)`."""
        found: list[Tensor] = []

        def visit(_: int, hidden_states: Any, __: Arguments) -> Tensor:
            found.append(hidden_states)
            raise Leave

        self._run(tokens, visit)
        return found[0]

    def calls(self, tokens: Tensor) -> list[BlockCall]:
        """What each block is called with, for batches of the shape of `tokens`, int64.

        Raises `ModelError` where a block's arguments depend on the tokens themselves: they could
        then not be replayed for the other batches.
        """
        shape = (tokens.shape[0], tokens.shape[1])
        if shape not in self._calls:
            calls, others = self._capture(tokens), self._capture(tokens.flip(1).roll(1, 1))
            for block, arguments in calls.items():
                if not same_arguments(arguments, others[block]):
                    raise ModelError(
                        f"block {block} of {type(self.model).__name__} is called with arguments "
                        "that depend on the tokens; this architecture is not supported"
                    )
            self._calls[shape] = [
                BlockCall(*calls[b]) if b in calls else BlockCall((), {}, passed_by=True)
                for b in range(len(self._blocks))
            ]
        return self._calls[shape]

    def logits(self, tokens: Tensor, hidden_states: Tensor) -> Tensor:
        """Logits `(batch, seqlen, vocabulary)` from the last block's output for `tokens`.

        The model's own forward runs, the blocks replaced by the given hidden states, so that final
        norms, projections and scalings are applied whatever they are.
        """
        output = self._run(tokens, lambda _, __, ___: hidden_states)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ModelError(f"{type(self.model).__name__} returns no logits")
        return logits

    def _capture(self, tokens: Tensor) -> dict[int, Arguments]:
        """What each block is called with, by its number, from one forward."""
        calls: dict[int, Arguments] = {}
        last = self._form.reached[-1]

        def visit(number: int, hidden_states: Any, arguments: Arguments) -> Tensor:
            calls[number] = arguments
            if number == last:
                raise Leave
            handed: Tensor = hidden_states
            return handed

        self._run(tokens, visit)
        if tuple(calls) != self._form.reached:
            raise ModelError(
                f"{type(self.model).__name__} calls other blocks for {tokens.shape[1]} tokens than "
                "for few; this architecture is not supported"
            )
        return calls

    @property
    def _form(self) -> TextForward:
        return text_forward(self._skeleton)

    def _run(self, tokens: Tensor, visit: Visit) -> Any:
        tokens, returns = tokens.to(self.device), self._form.returns
        try:
            with InPieces():
                return run_replaced(self.model, self._blocks, tokens, returns, visit)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"the forward of {type(self.model).__name__} fails around its blocks: "
                f"{first_line(error)}"
            ) from error


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
    block: nn.Module,
    call: BlockCall,
    hidden_states: Tensor,
    layers: tuple[str, ...],
    prefix: str = "",
) -> tuple[LayerGroup, ...]:
    """Groups `layers` of a block by the input tensor that one forward hands to each.

    `hidden_states` is `(batch, seqlen, hidden)`. Inputs are the same when they are the same view of
    the same memory; they are kept until the end of this one forward, or a freed input's address
    could be taken by another. prefix: the block's name in the model, with a dot, for messages.
    Raises `ModelError` for a layer that the forward never calls.
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
            raise ModelError(
                f"{prefix}{layer} is a linear layer that its block's forward never calls, so that "
                f"its inputs are not seen; leave it dense: --override '{prefix}{layer}=dense'"
            )
        # A tensor without rows has no memory: an expert that no token was sent to.
        key = tuple((x.data_ptr() if x.numel() else id(x), x.shape, x.stride()) for x in inputs)
        groups.setdefault(key, []).append(layer)
    return tuple(
        LayerGroup(tuple(names), columns[names[0]], len(key)) for key, names in groups.items()
    )
