"""Which layers of a model are pruned, decided from names and shapes alone before any compute."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from torch import nn

from pipeline.config.effect import refuse_of_model
from pipeline.config.layers import NO_EXPERTS, Choice, LayerRules
from pipeline.config.prune import PruneConfig
from pipeline.config.solver import SolverSettings
from pipeline.models.experts import expert_of
from pipeline.models.linears import (
    dense_weights,
    is_linear,
    linear_layers,
    unsupported_parameters,
    unsupported_reason,
)
from pipeline.models.skeleton import Skeleton, check_seqlen
from pipeline.models.text_forward import NOT_REACHED, text_forward
from pipeline.solvers.registry import solver_for
from storage.errors import ConfigError, ModelError


@dataclass(frozen=True)
class Selection:
    """A model's layers. pruned: how many; skipped: those that the options leave dense, name -> why;
    dense: what else of the blocks is never pruned and has two or more dimensions, name -> why."""

    pruned: int
    skipped: dict[str, str]
    dense: dict[str, str]


def choices_of(skeleton: Skeleton, block: int, rules: LayerRules) -> dict[str, Choice]:
    """Module path inside the block -> what is done with it, for every linear, in module order.

    Raises `ConfigError` for a width that the layer's pattern does not divide, unless such are
    skipped, and `ModelError` as `text_forward` does.
    """
    prefix, blocks = skeleton.block_prefix(block), len(skeleton.blocks)
    if block not in text_forward(skeleton).reached:
        return dict.fromkeys(linear_layers(skeleton.blocks[block]), Choice(None, NOT_REACHED))
    return {
        name: rules.choose(prefix + name, block, blocks, columns)
        for name, (_, columns) in linear_layers(skeleton.blocks[block]).items()
    }


def settings_of(skeleton: Skeleton, block: int, rules: LayerRules) -> dict[str, SolverSettings]:
    """Module path inside the block -> solver settings, of the linears that are pruned.

    Errors as `choices_of`.
    """
    chosen = choices_of(skeleton, block, rules).items()
    return {name: choice.settings for name, choice in chosen if choice.settings is not None}


def layers_to_prune(
    skeleton: Skeleton, block: int, rules: LayerRules
) -> dict[str, tuple[int, int]]:
    """Module path inside the block -> (R, C) of the linears that are pruned, in module order.

    Errors as `choices_of`.
    """
    shapes = linear_layers(skeleton.blocks[block])
    return {name: shapes[name] for name in settings_of(skeleton, block, rules)}


def select_layers(skeleton: Skeleton, rules: LayerRules) -> Selection:
    """Checks every block. Raises `ModelError` where a weight would stay dense unseen, and
    `ConfigError` where an option names nothing."""
    check_structure(skeleton)
    pruned = 0
    skipped: dict[str, str] = {}
    dense: dict[str, str] = {}
    for block, module in enumerate(skeleton.blocks):
        prefix = skeleton.block_prefix(block)
        dense |= {prefix + name: why for name, why in dense_weights(module).items()}
        for name, choice in choices_of(skeleton, block, rules).items():
            if choice.reason is None:
                skeleton.weight_name(block, name)  # or it could not be written back
                pruned += 1
            else:
                skipped[prefix + name] = choice.reason
    check_rules(skeleton, rules)
    if not pruned:
        raise ModelError(f"{skeleton.files.place}: no layer is left to prune")
    return Selection(pruned, skipped, dense)


def check_structure(skeleton: Skeleton) -> None:
    """Raises `ModelError` where a block holds what cannot be pruned, nor left dense unseen."""
    check_lists(skeleton)
    for block in text_forward(skeleton).reached:
        module = skeleton.blocks[block]
        hidden = unsupported_parameters(module)
        if hidden:
            raise ModelError(
                f"{skeleton.block_prefix(block)}{unsupported_reason(module, hidden)}; "
                f"{type(skeleton.model).__name__} is not supported"
            )


def check_lists(skeleton: Skeleton) -> None:
    """Raises `ModelError` where a block's layers lie in several lists (XLM: attention and MLPs):
    those in the others would stay dense unseen."""
    count, path = len(skeleton.blocks), skeleton.blocks_path
    outer = path.rpartition(".")[0]
    owner = skeleton.model.get_submodule(outer)
    for name, module in owner.named_children():
        full = f"{outer}.{name}".lstrip(".")
        if full == path or not isinstance(module, nn.ModuleList) or len(module) != count > 1:
            continue
        if all(any(is_linear(part) for part in entry.modules()) for entry in module):
            raise ModelError(
                f"{full} holds linear layers of each block beside {path}; prox24 prunes blocks "
                f"that are one module each; {type(skeleton.model).__name__} is not supported"
            )


def check_rules(skeleton: Skeleton, rules: LayerRules) -> None:
    """Raises `ConfigError` where an option names no layer, or no block, of the model."""
    names = [
        skeleton.block_prefix(block) + name
        for block, module in enumerate(skeleton.blocks)
        for name in linear_layers(module)
    ]
    modules = [name for name, _ in skeleton.model.named_modules()]
    rules.check(names, modules, len(skeleton.blocks))


def check_settings(skeleton: Skeleton, config: PruneConfig) -> Selection:
    """What shapes and config alone can tell. Raises an `InputError` for what cannot be pruned, and
    for options that were given and concern nothing in the model."""
    rules = config.layer_rules()
    for settings in rules.all_settings():
        solver_for(settings)
    check_seqlen(skeleton, config.seqlen)
    selection = select_layers(skeleton, rules)
    refuse_of_model(config, missing_in(skeleton, rules))
    _check_saved(skeleton, config, rules)
    return selection


def _check_saved(skeleton: Skeleton, config: PruneConfig, rules: LayerRules) -> None:
    """Raises `ConfigError` for a --save-layers that names no layer that is pruned."""
    if config.save_layers is None:
        return
    names = [
        skeleton.block_prefix(block) + name
        for block in range(len(skeleton.blocks))
        for name in layers_to_prune(skeleton, block, rules)
    ]
    if not fnmatch.filter(names, config.save_layers):
        raise ConfigError(
            f"--save-layers {config.save_layers} matches no whole name of a layer that is pruned; "
            f"they are like {names[0]}"
        )


def missing_in(skeleton: Skeleton, rules: LayerRules) -> dict[str, str]:
    """What options may concern and no pruned layer is -> a phrase that says so."""
    for block, module in enumerate(skeleton.blocks):
        if any(expert_of(module, name) for name in layers_to_prune(skeleton, block, rules)):
            return {}
    return {"experts": NO_EXPERTS}
