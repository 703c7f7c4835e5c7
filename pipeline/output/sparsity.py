"""Measures the sparsity of a model on disk, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

from pipeline.models.linears import linear_layers
from pipeline.models.skeleton import open_skeleton


def zero_share(folder: Path) -> float:
    """Share of exact zeros (0 to 1) in the weights of the linears of all decoder blocks."""
    skeleton = open_skeleton(folder, dtype=None, trust_remote_code=False)
    zeros = total = 0
    for block, module in enumerate(skeleton.blocks):
        for layer in linear_layers(module):
            weight = skeleton.read_weight(block, layer)
            zeros += int((weight == 0).sum())
            total += weight.numel()
    return zeros / total
