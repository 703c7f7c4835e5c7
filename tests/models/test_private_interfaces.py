"""What prox24 uses of transformers beyond its documented interface: a change there fails here.

Each is used behind one function or class of prox24, which is named beside it.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.models.experts import Experts, holds_transposed, is_stacked
from tests.support.tiny_models import tiny_config

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 260,
    "pad_token_id": 258,
}


def experts_of(model_type: str, **more: Any) -> nn.Module:
    """transformers' module of a block's experts."""
    config = AutoConfig.for_model(model_type, **_SMALL, **more)
    model = AutoModelForCausalLM.from_config(config)
    return next(m for path, m in model.named_modules() if path.endswith("experts"))


def test_names_of_stored_tensors() -> None:
    """`tensor_names`, `expert_tensors`: the table of conversions, and how a name is looked up."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **_SMALL))
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    merging = [c for c in converters if any(isinstance(o, MergeModulelist) for o in c.operations)]
    assert {p for c in merging for p in c.target_patterns} >= {".experts.gate_up_proj"}
    stored = "model.layers.0.block_sparse_moe.experts.10.w1.weight"
    target, pattern = rename_source_key(
        stored, renamings, converters, model.base_model_prefix, dict(model.named_parameters())
    )
    assert target == "model.layers.0.mlp.experts.gate_up_proj"
    assert pattern in {p for c in converters for p in c.source_patterns}
    assert sorted(("a.10.b", "a.9.b"), key=dot_natural_key) == ["a.9.b", "a.10.b"]


def test_flags_of_stacked_experts() -> None:
    """`experts.is_stacked`: what the decorator of transformers' kernels leaves on a module."""
    module = experts_of("mixtral")
    assert is_stacked(module)
    assert callable(module._apply_gate)
    for name in ("has_gate", "has_bias", "is_transposed"):
        assert isinstance(getattr(module, name), bool)
    assert not holds_transposed(module)
    interleaved = experts_of("gpt_oss", layer_types=["full_attention"], head_dim=8)
    assert is_stacked(interleaved)
    assert holds_transposed(interleaved)
    assert interleaved.has_bias


def test_stacked_experts_are_called_with_choices_and_weights() -> None:
    """`experts.Experts` takes their place: (hidden states, chosen experts, their weights)."""
    names = list(inspect.signature(type(experts_of("mixtral")).forward).parameters)
    own = list(inspect.signature(Experts.forward).parameters)
    assert names[:4] == own[:4] == ["self", "hidden_states", "top_k_index", "top_k_weights"]


def test_llama4_is_known_by_the_names_of_its_classes() -> None:
    """`experts.ScoredMixture`: the one mixture without the common kernels that is taken apart."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

    assert Llama4TextExperts.__name__ == "Llama4TextExperts"
    source = inspect.getsource(Llama4TextMoe.forward)
    assert "self.router(" in source
    assert "self.shared_expert(" in source


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights(tied: bool) -> None:
    """`skeleton`: which parameters are another's, by name."""
    model = AutoModelForCausalLM.from_config(tiny_config("llama", tied=tied))
    assert list(model.all_tied_weights_keys) == (["lm_head.weight"] if tied else [])


def test_parameters_kept_in_float32() -> None:
    """`skeleton`: names of what a class keeps in float32, whatever the dtype of the rest."""
    for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        assert hasattr(PreTrainedModel, name)
    model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    assert not model._keep_in_fp32_modules


def test_buffers_that_are_not_stored() -> None:
    """`skeleton`: torch's set of the buffers that are no part of a checkpoint."""
    module = nn.Module()
    module.register_buffer("table", torch.zeros(1), persistent=False)
    assert module._non_persistent_buffers_set == {"table"}


def test_names_of_the_classes_for_images_and_text() -> None:
    """`text_stack.WRAPPERS`."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES,
    )

    assert NAMES["llava"] == "LlavaForConditionalGeneration"
