"""Checks that a layer's inputs are the tokens of a batch, one row each, in their order.

Where only some tokens count (`--calibrate-on responses`), their rows are taken by number. A layer
that is called with heads, chunks or sequences in another order would then get the statistics of
other tokens without a word. All classes of transformers that prox24 prunes call their layers with
(n, seqlen, C), (n, 1, seqlen, C) or (n * seqlen, C); code that comes with a model may not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.experts import Experts, expert_of
from pipeline.models.forward_capture import BlockCall, LayerGroup
from storage.errors import ModelError

_COLUMNS = 256  # of a row that are compared
# A row has changed if it did by more than this share of what rows that should change do.
_CHANGED = 0.1
# Of a sequence's rows that should change so many must, and of the others at most the rest may.
_MOST = 0.75


@torch.no_grad()
def check_rows(
    module: nn.Module, call: BlockCall, hidden_states: Tensor, groups: Iterable[LayerGroup]
) -> None:
    """Raises `ModelError`, naming the layer, where rows of its inputs are not known to be tokens.

    module: the block. hidden_states: a batch of its inputs, (n, seqlen, hidden). An expert's layers
    have the tokens that are routed to it; of those, what all of its block's experts are called with
    is checked. Runs the block a few times with the signs of some tokens changed: exactly the rows
    that depend on them must change.
    """
    names = dict.fromkeys(_checked(module, group.name) for group in groups)
    before = _inputs(module, call, hidden_states.clone(), names)
    for changed in _changes(*hidden_states.shape[:2]):
        signs = torch.where(changed, -1, 1).to(hidden_states)[:, :, None]
        after = _inputs(module, call, hidden_states * signs, names)
        for name in names:
            for first, second in zip(before[name], after[name], strict=True):
                if problem := _problem(first, second, changed):
                    raise ModelError(
                        f"{name}: {problem}, so which of them are the responses' is not known; "
                        "leave it dense with --exclude, or use --calibrate-on all"
                    )


def _changes(sequences: int, length: int) -> Iterator[Tensor]:
    """Which tokens are changed together, (n, seqlen) bool.

    Sequences with a bit of their number set, one bit after another, which tells them all apart; and
    the second half of each: in a causal model no row of the first half depends on it.
    """
    numbers = torch.arange(sequences)
    for bit in range((sequences - 1).bit_length()):
        yield (numbers >> bit & 1).bool()[:, None].expand(-1, length)
    yield (torch.arange(length) >= length // 2).expand(sequences, -1)


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


def _problem(before: Tensor, after: Tensor, changed: Tensor) -> str | None:
    """What is wrong with inputs (rows, columns) of a batch's tokens; None if nothing.

    changed: (n, seqlen) bool, the tokens that should have others in `after` than in `before`.
    """
    tokens = changed.numel()
    if len(before) != tokens or len(after) != tokens:
        return f"it is called with {len(before)} inputs for {tokens} tokens"
    sizes = (before.norm(dim=1) + after.norm(dim=1)).clamp(min=torch.finfo(torch.float32).tiny)
    moved = ((after - before).norm(dim=1) / sizes).view(changed.shape).cpu()
    usual = moved[changed].median()
    found = moved > _CHANGED * usual
    rightly, wrongly = (found & changed).sum(dim=1), (found & ~changed).sum(dim=1)
    enough = rightly >= _MOST * changed.sum(dim=1)
    few = wrongly <= (1 - _MOST) * (~changed).sum(dim=1)
    if not bool(usual > 0) or not bool((enough & few).all()):
        return "its inputs are not in the order of the tokens"
    return None
