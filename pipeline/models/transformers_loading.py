"""transformers' private interface for loading weights: each use of it is behind one function here.

What `from_pretrained` makes of a folder is what prox24 computes with, so its own machinery is
asked: which names it renames, what it converts, what it ties, what it keeps in float32.
tests/models/test_transformers_loading.py fails where a transformers does something else.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils import logging

WRAPPERS = frozenset(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
"""Names of transformers' classes that answer to images and text with text."""

_MAY_BE_ENCODERS = frozenset({*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"})


@dataclass(frozen=True)
class Route:
    """A stored tensor and what it becomes.

    target: the model's tensor that it is, or the first of those that it is converted to. pattern:
    names its conversion (see `Routes.converter`), None where it is renamed at most.
    """

    stored: str
    target: str
    pattern: str | None = None


class Routes:
    """Which stored tensor becomes which of a model's, in the order in which they are loaded."""

    def __init__(self, model: PreTrainedModel, stored: Iterable[str]) -> None:
        """`model` as transformers made it; `stored`: the names in the weight files.

        Names that become nothing are left out, as transformers does.
        """
        self._state = model.state_dict()
        self._prefix = model.base_model_prefix
        self._mapping: list[Any] = get_model_conversion_mapping(model)
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        self.all = [
            route
            for name in sorted(stored, key=dot_natural_key)
            if (route := self._route(name, renamings, self._converters)) is not None
        ]

    @property
    def _converters(self) -> list[Any]:
        return [entry for entry in self._mapping if isinstance(entry, WeightConverter)]

    def _route(self, name: str, renamings: list[Any], converters: list[Any]) -> Route | None:
        target, pattern = rename_source_key(name, renamings, converters, self._prefix, self._state)
        if target not in self._state and name in self._state:
            # A name that is the model's already, which a renaming for another form of it met.
            target, pattern = rename_source_key(name, [], [], self._prefix, self._state)
        return Route(name, target, pattern) if target in self._state else None

    def of(self, targets: Iterable[str]) -> dict[str, list[Route]]:
        """Target -> its routes in order, of those `targets` that have any."""
        wanted = set(targets)
        found: dict[str, list[Route]] = {}
        for route in self.all:
            if route.target in wanted:
                found.setdefault(route.target, []).append(route)
        return found

    def converter(self, pattern: str) -> Any:
        """A fresh copy of the conversion that a route's `pattern` names."""
        owners = {p: converter for converter in self._converters for p in converter.source_patterns}
        return copy.deepcopy(owners[pattern])

    def targets(self, route: Route) -> tuple[str, ...]:
        """All tensors of the model that a route's conversion makes; its target is the first."""
        if route.pattern is None:
            return (route.target,)
        first, *rest = self.converter(route.pattern).target_patterns
        others = (route.target.replace(first, pattern) for pattern in rest)
        return (route.target, *(name for name in others if name in self._state))

    def merged(self, target: str) -> bool:
        """Whether a parameter is published as one tensor for each matrix of each expert."""
        return any(
            any(isinstance(operation, MergeModulelist) for operation in converter.operations)
            for converter in self._converters
            for pattern in converter.target_patterns
            if target.endswith(pattern.replace("\\", ""))
        )


def convert(
    converter: Any, target: str, sources: Iterable[tuple[Route, Tensor]], model: Any
) -> dict[str, Tensor]:
    """What a fresh `Routes.converter` makes of the tensors of `target`'s routes, in order, by name.

    Raises whatever its operations raise.
    """
    for route, tensor in sources:
        converter.add_tensor(target, route.stored, route.pattern, tensor)
    made = converter.convert(target, model=model, config=getattr(model, "config", None))
    values = {name: v[0] if isinstance(v, list) and v else v for name, v in made.items()}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def operations(converter: Any) -> str:
    """The names of what a conversion does, for messages."""
    return ", ".join(type(operation).__name__ for operation in converter.operations)


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter -> the one that it is tied to, where the config says so."""
    keys = getattr(model, "all_tied_weights_keys", None)
    if isinstance(keys, Mapping):
        return dict(keys)
    # A model's own code may not have called post_init, which makes the keys.
    if not getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False):
        return {}
    embedding = model.get_input_embeddings()
    source = next((n for n, m in model.named_modules() if m is embedding), None)
    targets = getattr(model, "_tied_weights_keys", None) or []
    return {} if source is None else dict.fromkeys(targets, f"{source}.weight")


def tie(model: PreTrainedModel, missing: set[str]) -> set[str]:
    """Makes one parameter of those that are tied; returns the `missing` that are so no more.

    missing: parameters that no stored tensor becomes. Of a tied pair the one that is there is
    taken; one both of which are there is left as two.
    """
    for name in tied_names(model):
        # Those that the constructor tied are two until it is known what is stored.
        path, _, own = name.rpartition(".")
        owner = model.get_submodule(path)
        parameter = getattr(owner, own, None)
        if isinstance(parameter, nn.Parameter) and parameter.is_meta:
            setattr(owner, own, nn.Parameter(torch.empty_like(parameter), requires_grad=False))
    left = set(missing)
    if isinstance(getattr(model, "all_tied_weights_keys", None), Mapping):
        with _silent():  # what is missing is told by who looks for it
            model.tie_weights(missing_keys=left, recompute_mapping=False)
        return missing - left
    model.tie_weights()  # type: ignore[call-arg,unused-ignore]
    return missing & set(tied_names(model))


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps transformers from logging what it finds in a model's files."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def compute_buffers(model: PreTrainedModel) -> None:
    """Computes again the buffers of a model on the meta device that its constructors computed.

    transformers 5 takes those that come after loading, when tensors are float32 by default; while
    a model is constructed they have the model's dtype, and rotary tables are less exact.
    """
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    with torch.no_grad():
        model.initialize_weights()


def kept_wide(model: PreTrainedModel, dtype: torch.dtype) -> list[re.Pattern[str]]:
    """Patterns of the parameters that stay float32 when a model is loaded in `dtype`."""
    wider: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        wider |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        wider |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return [re.compile(pattern.replace("*", ".*")) for pattern in sorted(wider)]


def has_flash_attention(version: int) -> bool:
    """Whether the package of FlashAttention `version` is installed.

    Where it is not, transformers fetches a kernel from the hub, if the package `kernels` is.
    """
    known = FLASH_ATTENTION_COMPATIBILITY_MATRIX.get(version)
    return known is None or bool(known["general_availability_check"]())


def is_causal_lm(model_type: object) -> bool:
    """Whether AutoModelForCausalLM has a class for a config's model_type."""
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def is_base_class(name: str, model_type: object) -> bool:
    """Whether a class is the base model of a model_type, without any head."""
    names = MODEL_MAPPING_NAMES.get(model_type) if isinstance(model_type, str) else None
    return name in (names if isinstance(names, (list, tuple)) else (names,))


def sees_later_tokens(model: PreTrainedModel) -> bool:
    """Whether a model's attention is that of an encoder: each token sees those after it.

    Classes of encoders have a causal LM too, which is one if `is_decoder` is set in the config.
    Others have a flag for it in their attention modules.
    """
    config = model.config.get_text_config()
    if hasattr(model.config, "vision_config"):  # the flags may be another tower's
        return False
    if config.model_type in _MAY_BE_ENCODERS:
        return not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))
    flags = {getattr(module, "is_causal", None) for module in model.modules()} - {None}
    return flags == {False}
