"""The norms of a block: what a reconstruction may train beside the pruned layers."""

from __future__ import annotations

from collections import Counter

from torch import nn

from pipeline.models.skeleton import Skeleton


def norm_parameters(block: nn.Module) -> dict[str, int]:
    """Weights and biases of a block's norms: path of the parameter in the block -> its length.

    A norm is a module whose class is named so (`LlamaRMSNorm`, `LayerNorm`). Only vectors of
    floats count.
    """
    return {
        f"{path}.{name}" if path else name: len(parameter)
        for path, module in block.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 1 and parameter.is_floating_point()
    }


def trainable_norms(skeleton: Skeleton, block: int) -> dict[str, str]:
    """The norms of a block that can be trained: path in the block -> dtype as stored.

    Each is a stored tensor of this block alone: blocks that share a norm leave it as it is, and so
    is one that transformers makes of other tensors.
    """
    prefix, sources = skeleton.block_prefix(block), skeleton.plan.sources
    users = Counter(sources.values())
    found = {}
    for name in norm_parameters(skeleton.blocks[block]):
        stored = sources.get(prefix + name)
        if stored is not None and users[stored] == 1:
            found[name] = skeleton.files.tensors[stored].dtype
    return found


def trained_norm(skeleton: Skeleton, block: int, norm: str) -> str:
    """The name in the weight files of a norm that `trainable_norms` names."""
    return skeleton.plan.sources[skeleton.block_prefix(block) + norm]
