"""Which tensor of the weight files each matrix of each expert is, by transformers' own conversion.

Most weight files hold one tensor for each matrix, under the names that a model was published with;
transformers renames and stacks them while it loads. Its conversion is run here on tensors of six
numbers each, which stand for the files' and say afterwards where they went. Others hold all experts
of a block in one tensor, in transformers' own layout or transposed; each is a part of it then. No
weight is read, and no family's names are known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.models.expert_part import ExpertPart
from pipeline.models.experts import Experts, is_stacked
from pipeline.models.transformers_loading import Route, Routes, convert
from storage.errors import ModelError
from storage.model.files import TensorEntry

# The shape of a stand-in: rows and columns differ, so that a transposed one is seen.
_ROWS, _COLUMNS = 2, 3

Stored = Mapping[str, TensorEntry]


@dataclass(frozen=True)
class ExpertNames:
    """Weights of experts' layers -> their tensors: `whole` by name, `parts` of stacked ones."""

    whole: dict[str, str] = field(default_factory=dict)
    parts: dict[str, ExpertPart] = field(default_factory=dict)


def stacked_targets(model: PreTrainedModel) -> set[str]:
    """Names of the parameters of stacked experts, in `model` as transformers made it."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if is_stacked(module)
        for name, _ in module.named_parameters(recurse=False)
    }


def stored_together(model: PreTrainedModel, rules: Routes, stored: Stored | None) -> set[str]:
    """Paths of the modules of stacked experts that are stored as one tensor for each parameter.

    `model` as transformers made it, `rules` its routes; `stored` None: as models of its class are
    published.
    """
    paths = {f"{path}.gate_up_proj": path for path, m in model.named_modules() if is_stacked(m)}
    if stored is None:
        return {path for target, path in paths.items() if not rules.merged(target)}
    return {
        paths[target]
        for target, own in rules.of(paths).items()
        if len(own) == 1 and len(stored[own[0].stored].shape) == 3
    }


def expert_names(model: PreTrainedModel, rules: Routes, stored: Stored) -> ExpertNames:
    """Where the weight files have each weight, and bias, of the experts' layers.

    `model` has `Experts` in place of stacked ones, `rules` are the routes of the model before that;
    `stored` are the tensors of the weight files.
    Raises `ModelError` where an expert's matrix is neither one whole tensor of the files nor one
    of a stack of all experts of its block, which says in what layout they are.
    """
    experts = {path: m for path, m in model.named_modules() if isinstance(m, Experts)}
    found = ExpertNames()
    owners = {f"{path}.{name}": path for path, m in experts.items() for name in _stacked_names(m)}
    for target, own in rules.of(owners).items():
        path, key, pattern = owners[target], own[0].stored, own[0].pattern
        name = target.removeprefix(f"{path}.")
        if len(own) == 1 and len(stored[key].shape) == (2 if name.endswith("_bias") else 3):
            shape = stored[key].shape
            turned = pattern is not None and _turns(
                rules.converter(pattern), target, own, model, shape, experts[path]
            )
            found.parts.update(_parts(experts[path], path, name, key, shape, turned))
            continue
        whole = None
        if pattern is not None:
            whole = _converted(rules.converter(pattern), target, own, model)
        keys = [route.stored for route in own]
        found.whole.update(_matched(experts[path], path, name, whole, keys))
    return found


def _stacked_names(experts: Experts) -> Iterator[str]:
    """The parameters that transformers has in place of the experts' layers."""
    layers = dict(next(iter(experts)).named_children())
    if "gate_proj" in layers:
        yield from ("gate_up_proj", "down_proj")
        return
    for name, layer in layers.items():
        yield name
        if getattr(layer, "bias", None) is not None:
            yield f"{name}_bias"


def _parts(
    experts: Experts, path: str, name: str, key: str, shape: tuple[int, ...], turned: bool
) -> dict[str, ExpertPart]:
    """Parameter -> its part of the stored tensor `key`; `turned`: transposed on loading."""
    layer, bias, _ = name.partition("_bias")
    if shape[0] != experts.count:
        raise ModelError(
            f"{key} has shape {list(shape)} in the weight files, but {path} has "
            f"{experts.count} experts"
        )
    if layer not in dict(next(iter(experts)).named_children()):
        raise ModelError(
            f"{key} holds all experts of a block in one tensor, but what else {path} is made of "
            "is stored otherwise; this layout is not supported"
        )
    kind = "bias" if bias else "weight"
    transposed = experts.transposed != turned and not bias
    return {
        f"{path}.{expert}.{layer}.{kind}": ExpertPart(key, expert, transposed)
        for expert in range(experts.count)
    }


class _Small:
    """A model whose parameters have stand-ins' shapes, for conversions that look at them."""

    def __init__(self, model: PreTrainedModel, shape: tuple[int, ...]) -> None:
        self._model, self._shape = model, shape

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, _: str) -> Tensor:
        return torch.empty(self._shape)


def _turns(
    converter: Any,
    target: str,
    sources: list[Route],
    model: PreTrainedModel,
    shape: tuple[int, ...],
    experts: Experts,
) -> bool:
    """Whether transformers transposes the experts of a stored stack of `shape` on loading it.

    Raises `ModelError` where it does anything else with them.
    """
    layer: Any = next(iter(experts)).get_submodule(target.rpartition(".")[2])
    rows, columns = layer.weight.shape
    held = (columns, rows) if experts.transposed else (rows, columns)
    count, (first, second) = experts.count, (_ROWS, _COLUMNS)
    expected = (count, first, second)
    # A square one has the parameter's shape either way: it is as transformers takes it.
    one = expected if shape[1:] == held else (count, second, first)
    stand_in = torch.arange(count * first * second).view(one)
    small: Any = _Small(model, expected)
    made = _converted(converter, target, sources, small, [stand_in])
    for turned, like in ((False, stand_in), (True, stand_in.mT)):
        if made is not None and torch.equal(made, like):
            return turned
    raise ModelError(
        f"{sources[0].stored} holds all experts of a block in one tensor, in an order that "
        "transformers changes on loading; this layout is not supported"
    )


def _converted(
    converter: Any,
    target: str,
    sources: list[Route],
    model: PreTrainedModel,
    stand_ins: list[Tensor] | None = None,
) -> Tensor | None:
    """What transformers makes of the stand-ins of `sources`; None if nothing."""
    if stand_ins is None:
        stand_ins = [_stand_in(number) for number in range(len(sources))]
    try:
        return convert(converter, target, zip(sources, stand_ins, strict=True), model).get(target)
    except Exception:  # whatever an operation makes of too few tensors
        return None


def _stand_in(number: int) -> Tensor:
    size = _ROWS * _COLUMNS
    return torch.arange(number * size, (number + 1) * size).view(_ROWS, _COLUMNS)


def _matched(
    experts: Experts, path: str, name: str, whole: Tensor | None, keys: list[str]
) -> dict[str, str]:
    """Parameter -> tensor, for the experts' layers that the stacked parameter `name` holds."""
    if experts.transposed:
        raise ModelError(
            f"{path}.{name} is transposed, and not one tensor of the weight files, which hold "
            f"{keys[0]}; this layout is not supported"
        )
    apart = "gate_proj" in dict(next(iter(experts)).named_children())
    layers = ["gate_proj", "up_proj"] if apart and name == "gate_up_proj" else [name]
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
