"""Mixtures of experts without data: which token goes where is not known, so an even share is taken.

Each of E experts is sent k / E of the tokens, k being the experts of a token. What uneven routing
can hold at most is `most_held`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.models.experts import Experts
from pipeline.planning.shapes.profile import ForwardProfile


def route_evenly(block: nn.Module) -> dict[str, int]:
    """Has a block's experts be sent even shares on the meta device, where routing has no data.

    Returns path -> experts of a token, for each module of experts: filled by the block's forward.
    """
    found: dict[str, int] = {}
    for path, module in block.named_modules():
        if isinstance(module, Experts):
            setattr(module, "routed", partial(_evenly, found, path, module.count))  # noqa: B010
    return found


def _evenly(
    found: dict[str, int], path: str, count: int, top_k_index: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    """In place of `Experts.routed`: indices (n,) without data, as many as an even share has."""
    tokens, found[path] = top_k_index.shape
    choices = tokens * found[path]
    # What finding them takes: to compare all choices, and to go through the result.
    (top_k_index == number).sum()
    share = (number + 1) * choices // count - number * choices // count
    return top_k_index.new_empty(share), top_k_index.new_empty(share)


def most_held(
    count: int, active: int, tokens: float, columns: int, matrix: float, each: float
) -> float:
    """Bytes that the sums of `count` experts hold at most, however the tokens are routed.

    active: experts of a token; tokens: that come. An expert holds `each` bytes an input while
    those are fewer than `columns`, then `matrix` bytes, which is more: so the most is where as many
    experts as possible have just enough tokens for a matrix.
    """
    choices = min(active, count) * tokens
    full = min(count, int(choices // columns)) if tokens >= columns else 0
    left = min(choices - full * columns, (count - full) * (columns - 1.0))
    return full * matrix + max(left, 0.0) * each


# -- layouts that are not pruned, but counted ----------------------------------------------------


def stub_others(
    block: nn.Module, config: object
) -> list[tuple[tuple[tuple[str, int, int], ...], int, int]]:
    """Modules of experts in a layout that is not pruned are made to give zeros.

    Returns, for each of their groups of layers, (name, R, C) of the layers, the number of experts
    and of those the experts of a token.
    """
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((int(n) for name in names if (n := getattr(config, name, None))), 0)
    active = int(getattr(config, "num_experts_per_tok", 0) or 1)
    found = []
    for path, module in block.named_modules():
        stacked = [
            (f"{path}.{name}", int(p.shape[1]), int(p.shape[2]))
            for name, p in module.named_parameters(recurse=False)
            if p.dim() == 3 and p.shape[0] == count
        ]
        if stacked:
            module.forward = lambda hidden_states, *_, **__: torch.zeros_like(hidden_states)
        last = [layer for layer in stacked if "down_proj" in layer[0]]
        for group in ([layer for layer in stacked if layer not in last], last):
            if group:
                found.append((tuple(group), count, active))
    return found


def with_others(
    full: ForwardProfile,
    others: list[tuple[tuple[tuple[str, int, int], ...], int, int]],
    seqlen: int,
) -> ForwardProfile:
    """A forward with what the stubs of `stub_others` leave out.

    The elementwise work of an expert is counted as reading and writing its input and output.
    """
    live = 0.0
    for layers, count, active in others:
        columns, rows = layers[0][2], sum(rows for _, rows, _ in layers)
        tokens = float(seqlen * active)
        full = replace(
            full,
            products=full.products + 2.0 * tokens * rows * columns,
            moved=full.moved + 4.0 * tokens * (rows + columns),
            operators=full.operators + 4 * count,
        )
        live = max(live, 4 * tokens * (rows + columns))
    return replace(full, live=full.live + int(live))
