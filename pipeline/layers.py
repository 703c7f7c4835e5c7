"""Which layers of a model are pruned, decided from shapes alone before any compute."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.linears import linear_layers, unsupported_parameters
from pipeline.model import Skeleton
from pipeline.solvers import Pattern, SolverSettings
from storage.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Selection:
    """A model's layers: how many are pruned, and the names of those that stay dense."""

    pruned: int
    skipped: tuple[str, ...]


def layers_to_prune(
    skeleton: Skeleton, block: int, settings: SolverSettings, skip_unsupported: bool
) -> dict[str, tuple[int, int]]:
    """Module path inside the block -> (R, C) of the linears that are pruned, in module order.

    Raises `ConfigError` for a width that the pattern does not divide, unless they are skipped.
    """
    pattern = Pattern.parse(settings.pattern)
    layers = {}
    for name, (rows, columns) in linear_layers(skeleton.blocks[block]).items():
        try:
            pattern.check_columns(columns)
        except ConfigError as error:
            if skip_unsupported:
                continue
            raise ConfigError(
                f"{skeleton.block_prefix(block)}{name}: {error}; --skip-unsupported leaves such "
                "layers dense"
            ) from error
        layers[name] = (rows, columns)
    return layers


def select_layers(skeleton: Skeleton, settings: SolverSettings, skip: bool) -> Selection:
    """Checks every block. Raises `ModelError` where a weight would stay dense unseen."""
    pruned, skipped = 0, []
    for block, module in enumerate(skeleton.blocks):
        prefix = skeleton.block_prefix(block)
        hidden = unsupported_parameters(module)
        if hidden:
            raise ModelError(
                f"{prefix}{hidden[0]} is a weight matrix outside linear layers, which prox24 "
                f"cannot prune; {type(skeleton.model).__name__} is not supported"
            )
        layers = layers_to_prune(skeleton, block, settings, skip)
        pruned += len(layers)
        skipped += [prefix + name for name in linear_layers(module) if name not in layers]
    if not pruned:
        raise ModelError(f"{skeleton.files.place}: no layer is left to prune")
    return Selection(pruned, tuple(skipped))
