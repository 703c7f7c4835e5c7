"""The text stack of a model: all of a causal LM, or what a multimodal wrapper has for text.

Of a wrapper (`Gemma3ForConditionalGeneration`: vision tower, projector, language model) only the
text stack is run and pruned. The rest is never loaded.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from pipeline.models.transformers_loading import WRAPPERS


def auto_class(config: PretrainedConfig) -> Any:
    """transformers' factory for the class that `config` says the weights were saved from."""
    names = config.architectures or []
    if any(name in WRAPPERS for name in names):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def decoder_path(model: PreTrainedModel) -> str:
    """Module path of the decoder, which holds the blocks; empty where the model names none."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    if isinstance(decoder, nn.Linear):  # ModernBERT's `decoder` is the output embedding
        return ""
    return next((path for path, module in model.named_modules() if module is decoder), "")


def outside_text(model: PreTrainedModel) -> set[int]:
    """Ids of the parameters that no forward of text alone uses: a wrapper's other towers."""
    path = decoder_path(model)
    if model.config.get_text_config() is model.config or not path:
        return set()
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    used: list[nn.Module] = [model.get_submodule(path), *(end for end in ends if end is not None)]
    text = {id(parameter) for module in used for parameter in module.parameters()}
    return {id(parameter) for parameter in model.parameters()} - text
