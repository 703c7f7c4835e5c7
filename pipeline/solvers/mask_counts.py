"""Counts that describe a mask, taken while the dense weight is still in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.config.pattern import Pattern
from pipeline.solvers.masks import keep_mask

# Weights counted at once: little memory compared with a solve. On a GPU, where each chunk is some
# fifty kernels and a wait, they are more.
_CHUNK_WEIGHTS = 1 << 20
_CHUNK_WEIGHTS_GPU = 1 << 24
_WIDEST_GROUP = 8  # up to this M each of the 2^M possible sets of positions is counted


@torch.no_grad()
def mask_counts(
    pruned: Tensor, dense: Tensor, pattern: Pattern, moments: Tensor | None = None
) -> dict[str, Any]:
    """Counts for a row slice; `merge_mask_counts` adds up those of a layer's slices.

    pruned, dense: (rows, C) of any float dtype. moments: (C,) sums of the squared inputs, or None.
    Returns `weights`: number of weights; `kept`: those not zero in `pruned`; `magnitude_too`: the
    kept ones that `keep_mask` of |dense| keeps as well; `groups`: for N:M with M up to 8, number of
    groups per set of kept positions, as "1010" (the first and the third of four); `by_column`:
    int64 (C,) on the CPU, number of rows that keep each input; `along_norm`: the sum of `by_column`
    times the standardized logarithm of the inputs' norms, None without `moments`.
    """
    rows, columns = pruned.shape
    counts = torch.zeros(2, dtype=torch.int64, device=pruned.device)
    by_column = torch.zeros(columns, dtype=torch.int64, device=pruned.device)
    width = pattern.group if pattern.group <= _WIDEST_GROUP else 0
    groups = torch.zeros(1 << width, dtype=torch.int64, device=pruned.device)
    bits = 1 << torch.arange(width, device=pruned.device)
    step = rows_at_once(columns, pruned.device.type)
    for start in range(0, rows, step):
        kept = pruned[start : start + step] != 0
        magnitude = keep_mask(pattern, dense[start : start + step].abs())
        counts += torch.stack((kept.sum(), (kept & magnitude).sum()))
        by_column += kept.sum(dim=0)
        if width:
            codes = (kept.reshape(-1, width) * bits).sum(dim=1)
            groups += torch.bincount(codes, minlength=len(groups))
    totals, group_counts, by_column = counts.tolist(), groups.tolist(), by_column.cpu()
    along = None if moments is None else float(by_column.double() @ _standardized(moments.cpu()))
    return {
        "weights": pruned.numel(),
        "kept": totals[0],
        "magnitude_too": totals[1],
        "groups": {_positions(code, width): n for code, n in enumerate(group_counts) if n},
        "by_column": by_column,
        "along_norm": along,
    }


def rows_at_once(columns: int, device: str) -> int:
    """Rows of so many weights that `mask_counts` counts at once; device: a torch device type."""
    return max(1, (_CHUNK_WEIGHTS_GPU if device == "cuda" else _CHUNK_WEIGHTS) // max(columns, 1))


def _standardized(moments: Tensor) -> Tensor:
    """Logarithms of sums of squares (C,), shifted and scaled to mean 0 and variance 1, float64.

    All 0 where all sums are equal. An input that is always 0 counts as the smallest non-zero one.
    """
    values = moments.double()
    positive = values[values > 0]
    if not len(positive):
        return torch.zeros_like(values)
    logs = values.clamp(min=float(positive.min())).log()
    logs -= logs.mean()
    spread = logs.square().mean().sqrt()
    return logs / spread if spread > 0 else torch.zeros_like(logs)


def _positions(code: int, width: int) -> str:
    return "".join("1" if code >> position & 1 else "0" for position in range(width))


def merge_mask_counts(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of a layer from those of all its row slices, as JSON values.

    `weights`, `kept`, `magnitude_too` and `groups` as in `mask_counts`; `columns`: see
    `column_pattern`.
    """
    by_column = torch.stack([part["by_column"] for part in parts]).sum(dim=0)
    along = [part["along_norm"] for part in parts]
    total = {key: sum(part[key] for part in parts) for key in ("weights", "kept", "magnitude_too")}
    rows = total["weights"] // max(len(by_column), 1)
    return {
        **total,
        "groups": merged_groups(part["groups"] for part in parts),
        "columns": column_pattern(by_column, rows, None if None in along else sum(along)),
    }


def column_pattern(by_column: Tensor, rows: int, along_norm: float | None) -> dict[str, Any]:
    """How evenly a mask keeps the inputs (columns) of a layer.

    by_column: int64 (C,), number of the `rows` that keep each input. Returns `count`: C; `never`:
    inputs that no row keeps, which no longer affect the layer; `rarely` and `often`: inputs kept
    less than half and more than one and a half times as often as the mean (at 2:4: by less than a
    quarter and more than three quarters of the rows; `rarely` includes `never`);
    `norm_correlation`: Pearson correlation of how often an input is kept and the logarithm of its
    norm, None where it is unknown or undefined.
    """
    often = by_column.double()
    mean = float(often.mean()) if len(often) else 0.0
    spread = float((often - mean).square().mean().sqrt()) if len(often) else 0.0
    correlation = None
    if along_norm is not None and spread > 0:
        correlation = min(1.0, max(-1.0, along_norm / len(often) / spread))
    return {
        "count": len(often),
        "never": int((by_column == 0).sum()) if rows else 0,
        "rarely": int((often < mean / 2).sum()),
        "often": int((often > 1.5 * mean).sum()),
        "norm_correlation": correlation,
    }


def merged_groups(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The counts of each set of positions, summed over `parts` and sorted by key."""
    total: dict[str, int] = {}
    for part in parts:
        for positions, count in part.items():
            total[positions] = total.get(positions, 0) + count
    return dict(sorted(total.items()))
