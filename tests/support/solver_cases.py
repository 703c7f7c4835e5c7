"""Problems for solver tests, and slow solvers written apart from ours, entry by entry."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.solvers.types import Statistics

GOLDEN = (
    "block5_self_attn_k_proj",
    "block12_self_attn_o_proj",
    "block20_mlp_down_proj",
    "dead_columns",
)


def golden(shared: Path, name: str) -> dict[str, Tensor]:
    """A reference layer: ``weight``, ``inputs``, and other codes' outputs."""
    return load_file(shared / "golden" / f"{name}.safetensors")


def statistics_of(inputs: Tensor, sequences: int | None = None) -> Statistics:
    """Sums over ``inputs`` (sequences, tokens, C) or (tokens, C)."""
    columns = inputs.shape[-1]
    x = inputs.reshape(-1, columns).float()
    if sequences is None:
        sequences = inputs.shape[0] if inputs.ndim == 3 else 1
    return Statistics(
        columns=columns,
        tokens=x.shape[0],
        sequences=sequences,
        diagonal=x.square().sum(dim=0),
        hessian=x.T @ x,
    )


def layer(
    rows: int = 12, columns: int = 32, tokens: int = 96, seed: int = 0, dead: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """A weight (R, C) and correlated inputs (2, tokens, C) with columns of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    sizes = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    inputs = torch.randn(2, tokens, columns, generator=generator)
    inputs = (inputs + 1.5 * inputs @ mixing) * sizes
    inputs[..., list(dead)] = 0
    return torch.randn(rows, columns, generator=generator), inputs


def smallest(scores: list[float], count: int) -> list[int]:
    """Places of the ``count`` smallest, the earlier first among equals."""
    return sorted(range(len(scores)), key=lambda j: (scores[j], j))[:count]


def slow_wanda(weight: Tensor, inputs: Tensor, keep: int, group: int) -> Tensor:
    """Wanda by its definition, one entry at a time in Python floats; ``group`` 0: per row half."""
    x = inputs.reshape(-1, inputs.shape[-1]).double()
    norms = x.square().mean(dim=0).sqrt().tolist()
    pruned = weight.clone()
    for row in range(weight.shape[0]):
        scores = [abs(w) * n for w, n in zip(weight[row].tolist(), norms, strict=True)]
        width = group or len(scores)
        drop = group - keep if group else len(scores) // 2
        for start in range(0, len(scores), width):
            for place in smallest(scores[start : start + width], drop):
                pruned[row, start + place] = 0
    return pruned


def slow_sparsegpt(
    weight: Tensor, inputs: Tensor, keep: int, group: int, *, damping: float = 0.01, block: int = 8
) -> Tensor:
    """SparseGPT without lazy blocks or a Cholesky factor, (R, C) float64.

    After column i is pruned, the optimal change of the columns at its right is a regression on
    their own inverse Hessian, which is computed afresh for every column. ``group`` 0: half of
    every ``block`` columns by one threshold over all rows.
    """
    x = inputs.reshape(-1, inputs.shape[-1]).double()
    hessian = 2 / inputs.shape[0] * x.T @ x
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    result = weight.double() * ~dead
    columns = weight.shape[1]
    inverses = [torch.linalg.inv(hessian[i:, i:]) for i in range(columns)]
    kept = torch.ones_like(result, dtype=torch.bool)
    for i in range(columns):
        if (group and i % group == 0) or (not group and i % block == 0):
            span = range(i, i + group) if group else range(i, min(i + block, columns))
            pivots = torch.stack([inverses[j][0, 0] for j in span])
            score = result[:, span.start : span.stop].square() / pivots
            if group:
                for row in range(result.shape[0]):
                    for place in smallest(score[row].tolist(), group - keep):
                        kept[row, i + place] = False
            else:
                threshold = score.flatten().sort().values[score.numel() // 2]
                kept[:, span.start : span.stop] = score > threshold
        error = torch.where(kept[:, i], torch.zeros(()).double(), result[:, i])
        result[:, i:] -= error[:, None] * (inverses[i][0] / inverses[i][0, 0])
    return result * kept
