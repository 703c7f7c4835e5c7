"""Which tensor of the weight files each matrix of each expert is, by transformers' own conversion.

Weight files hold one tensor for each matrix, under the names that a model was published with;
transformers renames and stacks them while it loads. Its conversion is run here on tensors of six
numbers each, which stand for the files' and say afterwards where they went. No weight is read, and
no family's names are known.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.experts import Experts
from storage.errors import ModelError

# The shape of a stand-in: rows and columns differ, so that a transposed one is seen.
_ROWS, _COLUMNS = 2, 3


def expert_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Weight of each expert's layer -> its name in the weight files.

    `model` has `Experts` in place of stacked ones; `stored` are the names in the weight files.
    Raises `ModelError` where an expert's matrix is not one whole tensor of the files, which says in
    what layout they are.
    """
    experts = {path: m for path, m in model.named_modules() if isinstance(m, Experts)}
    if not experts:
        return {}
    # Of transformers 5; before it no experts were stacked.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    stacked = {f"{path}.{name}" for path, m in experts.items() for name in _stacked_names(m)}
    known = dict.fromkeys(stacked, True)
    found: dict[str, str] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, known
        )
        if target in stacked and pattern is not None:
            parts.setdefault(target, []).append((key, pattern))
        elif target in stacked:
            raise ModelError(
                f"the weight files hold {key}, all experts in one tensor; prox24 prunes experts "
                "that are stored as a tensor for each matrix, as the model was published"
            )
    for target, sources in parts.items():
        path, _, name = target.rpartition(".")
        converter = copy.deepcopy(by_pattern[sources[0][1]])
        whole = _converted(converter, target, sources, model)
        keys = [key for key, _ in sources]
        found |= _matched(experts[path], path, name, whole, keys)
    return found


def _stacked_names(experts: Experts) -> tuple[str, ...]:
    gated = "gate_proj" in dict(next(iter(experts)).named_children())
    return ("gate_up_proj" if gated else "up_proj", "down_proj")


def _converted(
    converter: Any, target: str, sources: list[tuple[str, str]], model: nn.Module
) -> Tensor | None:
    """What transformers makes of the stand-ins of `sources`, (tensor, pattern); None if nothing."""
    for number, (key, pattern) in enumerate(sources):
        converter.add_tensor(target, key, pattern, _stand_in(number))
    try:
        made = converter.convert(target, model=model, config=getattr(model, "config", None))
    except Exception:  # whatever an operation makes of too few tensors
        return None
    value = made.get(target)
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, Tensor) else None


def _stand_in(number: int) -> Tensor:
    size = _ROWS * _COLUMNS
    return torch.arange(number * size, (number + 1) * size).view(_ROWS, _COLUMNS)


def _matched(
    experts: Experts, path: str, name: str, whole: Tensor | None, keys: list[str]
) -> dict[str, str]:
    """Parameter -> tensor, for the experts' layers that the stacked parameter `name` holds."""
    layers = ["gate_proj", "up_proj"] if name == "gate_up_proj" else [name]
    if whole is None or whole.shape != (experts.count, len(layers) * _ROWS, _COLUMNS):
        raise ModelError(
            f"{path}.{name} is not made of the {experts.count * len(layers)} matrices of its "
            f"experts: the weight files hold {len(keys)} of them"
        )
    found = {}
    for expert in range(experts.count):
        for layer, rows in zip(layers, whole[expert].chunk(len(layers)), strict=True):
            number = int(rows[0, 0]) // (_ROWS * _COLUMNS)
            if not torch.equal(rows, _stand_in(number)):
                raise ModelError(
                    f"{path}.{expert}.{layer} is no whole tensor of the weight files, such as "
                    f"{keys[0]}; this layout is not supported"
                )
            found[f"{path}.{expert}.{layer}.weight"] = keys[number]
    return found
