"""Checks that a layer's inputs are the tokens of a batch, one row each, in their order.

Where only some tokens count (`--calibrate-on responses`), their rows are taken by number. A layer
that is called with heads, chunks or sequences in another order would then get the statistics of
other tokens without a word. All classes of transformers that prox24 prunes call their layers with
(n, seqlen, C), (n, 1, seqlen, C) or (n * seqlen, C); code that comes with a model may not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.experts import Experts, expert_of
from pipeline.models.forward_capture import BlockCall, LayerGroup
from storage.errors import ModelError

_COLUMNS = 256  # of a row that are compared
# A row has changed if it did by more than this share of what the changed rows do.
_CHANGED = 0.1
# Of the rows of a sequence that was changed at least so many have, of another's at most the rest.
_MOST = 0.75


@torch.no_grad()
def check_rows(
    module: nn.Module, call: BlockCall, hidden_states: Tensor, groups: Iterable[LayerGroup]
) -> None:
    """Raises `ModelError`, naming the layer, where rows of its inputs are not known to be tokens.

    module: the block. hidden_states: a batch of its inputs, (n, seqlen, hidden). An expert's layers
    have the tokens that are routed to it; of those, what all of its block's experts are called with
    is checked. Runs the block twice: the second time every other sequence has its sign changed, and
    exactly its rows must change.
    """
    names = dict.fromkeys(_checked(module, group.name) for group in groups)
    changed = torch.arange(hidden_states.shape[0]) % 2 == 1
    signs = torch.where(changed, -1, 1).to(hidden_states)[:, None, None]
    before = _inputs(module, call, hidden_states.clone(), names)
    after = _inputs(module, call, hidden_states * signs, names)
    for name in names:
        for first, second in zip(before[name], after[name], strict=True):
            if problem := _problem(first, second, changed, hidden_states.shape[1]):
                raise ModelError(
                    f"{name}: {problem}, so which of them are the responses' is not known; leave "
                    "it dense with --exclude, or use --calibrate-on all"
                )


def _checked(module: nn.Module, layer: str) -> str:
    """The module whose input is looked at: the layer, or the experts of which it is one's."""
    if expert_of(module, layer) is None:
        return layer
    while not isinstance(module.get_submodule(layer), Experts):
        layer = layer.rpartition(".")[0]
    return layer


def _inputs(
    module: nn.Module, call: BlockCall, hidden_states: Tensor, names: Iterable[str]
) -> dict[str, list[Tensor]]:
    """Some columns, (rows, columns) fp32, of the inputs of each call of `names` in one forward."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (
                args[0]
                if args
                else kwargs["hidden_states" if "hidden_states" in kwargs else "input"]
            )
            step = -(-x.shape[-1] // _COLUMNS)
            rows = x.reshape(-1, x.shape[-1])[:, ::step]
            seen[name].append(rows.to(torch.float32, copy=True))

        return keep

    handles = [
        module.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
        for name in seen
    ]
    try:
        call.run(module, hidden_states)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _problem(before: Tensor, after: Tensor, changed: Tensor, length: int) -> str | None:
    """What is wrong with inputs (rows, columns) of `length` tokens a sequence; None if nothing.

    changed: (n,) bool, the sequences of which `after` has others than `before`.
    """
    tokens = len(changed) * length
    if len(before) != tokens or len(after) != tokens:
        return f"it is called with {len(before)} inputs for {tokens} tokens"
    if not bool(changed.any()):
        return None  # one sequence
    sizes = (before.norm(dim=1) + after.norm(dim=1)).clamp(min=torch.finfo(torch.float32).tiny)
    moved = ((after - before).norm(dim=1) / sizes).view(len(changed), length).cpu()
    usual = moved[changed].median()
    shares = (moved > _CHANGED * usual).float().mean(dim=1)
    right = torch.where(changed, shares >= _MOST, shares <= 1 - _MOST)
    if not bool(usual > 0) or not bool(right.all()):
        return "its inputs are not in the order of the sequences"
    return None
