"""What a mask looks like, counted row by row while the dense weight is still at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.solvers.pattern import Pattern

_CHUNK_WEIGHTS = 1 << 20  # looked at at once: little memory beside a solve's
_WIDEST_GROUP = 8  # of which each of the 2^M possible sets of positions is counted


@torch.no_grad()
def mask_counts(pruned: Tensor, dense: Tensor, pattern: Pattern) -> dict[str, Any]:
    """Counts in rows of a layer, as JSON; those of disjoint rows add up (`merge_mask_counts`).

    pruned, dense: (rows, C) of any float dtype. `weights`: all; `kept`: not zero in `pruned`;
    `magnitude_too`: of these, what `Pattern.keep_mask` of |dense| keeps; `groups`: for N:M with M
    up to 8, how many groups keep which positions, as "1010" (the first and the third of four).
    """
    rows, columns = pruned.shape
    counts = torch.zeros(2, dtype=torch.int64, device=pruned.device)
    width = pattern.group if pattern.group <= _WIDEST_GROUP else 0
    groups = torch.zeros(1 << width, dtype=torch.int64, device=pruned.device)
    bits = 1 << torch.arange(width, device=pruned.device)
    step = max(1, _CHUNK_WEIGHTS // max(columns, 1))
    for start in range(0, rows, step):
        kept = pruned[start : start + step] != 0
        magnitude = pattern.keep_mask(dense[start : start + step].abs())
        counts += torch.stack((kept.sum(), (kept & magnitude).sum()))
        if width:
            codes = (kept.reshape(-1, width) * bits).sum(dim=1)
            groups += torch.bincount(codes, minlength=len(groups))
    both, found = counts.tolist(), groups.tolist()
    return {
        "weights": pruned.numel(),
        "kept": both[0],
        "magnitude_too": both[1],
        "groups": {_positions(code, width): n for code, n in enumerate(found) if n},
    }


def _positions(code: int, width: int) -> str:
    return "".join("1" if code >> position & 1 else "0" for position in range(width))


def merge_mask_counts(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of disjoint parts together."""
    return {
        **{key: sum(part[key] for part in parts) for key in ("weights", "kept", "magnitude_too")},
        "groups": merged_groups(part["groups"] for part in parts),
    }


def merged_groups(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sums of equal keys, sorted by key."""
    total: dict[str, int] = {}
    for part in parts:
        for positions, count in part.items():
            total[positions] = total.get(positions, 0) + count
    return dict(sorted(total.items()))
