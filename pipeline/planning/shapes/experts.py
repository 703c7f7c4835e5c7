"""Mixtures of experts without data: routing is not known, so it is assumed to be even.

Each of E experts gets k / E of the tokens, where k is the number of experts per token. The maximum
of the memory over all ways to route is `most_sum_bytes`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.models.experts import Experts
from pipeline.planning.shapes.profile import ForwardProfile


def route_evenly(block: nn.Module) -> dict[str, int]:
    """Makes the experts of a block on the meta device, which has no data, get even shares.

    Returns path -> experts per token, for each module of experts; the forward of the block fills
    it in.
    """
    per_token: dict[str, int] = {}
    for path, module in block.named_modules():
        if isinstance(module, Experts):
            setattr(module, "routed", partial(_evenly, per_token, path, module.count))  # noqa: B010
    return per_token


def _evenly(
    per_token: dict[str, int], path: str, count: int, top_k_index: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    """Replaces `Experts.routed`: two index tensors (n,) without data, n being an even share.

    top_k_index: (tokens, experts per token). number: the expert, of `count`.
    """
    tokens, per_token[path] = top_k_index.shape
    choices = tokens * per_token[path]
    # The work of finding the tokens is counted: comparing all choices, and reading the result.
    (top_k_index == number).sum()
    share = (number + 1) * choices // count - number * choices // count
    return top_k_index.new_empty(share), top_k_index.new_empty(share)


def most_sum_bytes(
    count: int, active: int, tokens: float, columns: int, matrix: float, each: float
) -> float:
    """The most bytes that the sums of `count` experts can take, over all ways to route the tokens.

    active: experts per token. tokens: their number, before routing. An expert holds `each` bytes
    per input while it has fewer inputs than `columns`, then `matrix` bytes, which is more. So the
    maximum is where as many experts as possible have just enough tokens for a matrix.
    """
    choices = min(active, count) * tokens
    full = min(count, int(choices // columns)) if tokens >= columns else 0
    left = min(choices - full * columns, (count - full) * (columns - 1.0))
    return full * matrix + max(left, 0.0) * each


# -- layouts of experts that are counted, but cannot be pruned -----------------------------------


def stub_others(
    block: nn.Module, config: object
) -> list[tuple[tuple[tuple[str, int, int], ...], int, int]]:
    """Makes modules of experts in a layout that cannot be pruned return zeros.

    Returns, for each of their groups of layers: (name, R, C) of each layer, the number of experts,
    and the experts per token.
    """
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((int(n) for name in names if (n := getattr(config, name, None))), 0)
    active = int(getattr(config, "num_experts_per_tok", 0) or 1)
    groups = []
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
                groups.append((tuple(group), count, active))
    return groups


def with_others(
    full: ForwardProfile,
    others: list[tuple[tuple[tuple[str, int, int], ...], int, int]],
    seqlen: int,
) -> ForwardProfile:
    """`full` with the work of the experts that `stub_others` replaced.

    The elementwise work of an expert is counted as reading and writing its inputs and outputs.
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
