"""Tiny configs of every causal LM that transformers has, made from its config class's defaults.

Numbers are shrunk by the names of the config's fields; `OVERRIDES` has what that does not fit.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.support.tiny_models import VOCABULARY

LAYERS = 6
# The first pattern that fits a field's whole name says what its number becomes.
_NUMBERS: tuple[tuple[str, int], ...] = (
    (r"num_hidden_layers|num_layers|n_layers?|num_decoder_layers|decoder_layers", LAYERS),
    (r"vocab_size|vocab_size_per_layer_input", VOCABULARY),
    (r"hidden_size|n_embd|d_model|dim|embed_dim|word_embed_proj_dim|embedding_size", 32),
    (r"attention_hidden_size|hidden_dim|lru_width|attn_hidden_size", 32),
    (r"ffn_dim|n_inner|.*intermediate_size|.*ffn_hidden_size|intermediate_size_mlp", 48),
    (r"dim_ff|dff|decoder_ffn_dim|block_ff_dim", 48),
    (r"num_attention_heads|n_heads?|num_heads", 4),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads", 2),
    (r"kv_channels|.*head_dim|.*headdim|.*_head_size|head_size|dim_head", 8),
    (r"kv_lora_rank|q_lora_rank|.*lora_rank|o_lora.*|.*rank", 16),
    (r".*num_experts|num_local_experts|n_routed_experts|num_routed_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|moe_top_k|num_experts_per_token|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_groups?|n_groups|mamba_n_groups|mamba_ngroups", 1),
    (r"max_position_embeddings|n_positions|max_seq_len|max_sequence_length|n_ctx|seq_length", 256),
    (r".*num_heads|.*n_heads|num_.*_heads|decoder_attention_heads|encoder_attention_heads", 4),
    (r"ssm_state_size|state_size|.*d_state", 8),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r".*chunk_size", 8),
    (r"sliding_window|window_size|.*sliding_window", 8),
    (r"mamba_d_ssm|.*d_inner|conv_dim", 64),
)
_TOKENS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
# What some classes need, though the field's default is None.
_UNSET = {"head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_SECTIONS = {"rope_parameters": _MROPE}
_HALVED = {"rope_parameters": _MROPE | {"mrope_section": [1, 1, 0]}}
_CONV = ["conv", "full_attention"] * 3
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA2 | {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cosmos3_edge": {"text_config": _SECTIONS},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2}},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": _MAMBA2 | {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "glm5_next": {"text_config": {"num_key_value_heads": 4}},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": _MAMBA2 | {"layer_types": ["mamba", "attention"] * 3},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2, "use_mamba_kernels": False},
    "lfm2": {"layer_types": _CONV, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": _CONV},
    "longcat_flash": {"num_layers": 3},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
    },
    "olmo_hybrid": {"linear_num_value_heads": 4},
    "xglm": {"attention_heads": 4},
    "glm4v": {"text_config": _SECTIONS},
    "paddleocr_vl": {"text_config": _SECTIONS},
    "qwen2_5_omni_thinker": {"text_config": _SECTIONS},
    "qwen2_5_vl": {"text_config": _SECTIONS},
    "qwen2_vl": {"text_config": _SECTIONS},
    "ernie4_5_vl_moe": {"text_config": _SECTIONS},
    "glm46v": {"text_config": _SECTIONS | {"model_type": "glm4v_text"}},
    "glm4v_moe": {"text_config": _HALVED},
    "glm_ocr": {"text_config": _HALVED},
    "glmga": {"text_config": _SECTIONS | {"model_type": "glm4v_text"}},
    "zamba": {"use_mamba_kernels": False, "layers_block_type": ["mamba", "hybrid"] * 3},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 3, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
NOT_MADE = {
    "hunyuan_vl": "its defaults lack the sections of its rotary embedding",
    "kimi_k25": "its defaults make a table of 30 GB",
    "step3p7": "its defaults lack the sliding window of its text stack",
    "xmod": "its defaults name no language",
}
"""Families whose default configs make no model that runs, and why."""
# Latent attention has as many heads of keys as of queries.
_LATENT = {"num_key_value_heads": 4}

FAMILIES: dict[str, str] = {
    **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    **{
        kind: name
        for kind, name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    },
}
"""model_type -> the class of transformers that answers with text, alone or about images."""


def class_config(model_type: str) -> PretrainedConfig:
    """The tiny config of a family of FAMILIES, with the class that it is of. May raise anything."""
    if model_type in NOT_MADE:
        raise ValueError(NOT_MADE[model_type])
    config = _shrunk(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))
    config.architectures = [FAMILIES[model_type]]
    return config


def _shrunk(kind: Any, overrides: dict[str, Any]) -> PretrainedConfig:
    own: dict[str, Any] = {}
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, field in fields.items():
        number = field.default
        if name == "is_decoder":
            own[name] = True
        elif name in _TOKENS:
            own[name] = _TOKENS[name]
        elif name in _UNSET and number is None:
            own[name] = _UNSET[name]
        elif isinstance(number, int) and not isinstance(number, bool):
            for pattern, small in _NUMBERS:
                if re.fullmatch(pattern, name):
                    own[name] = small
                    break
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        own |= _LATENT
    parts: dict[str, Any] = getattr(kind, "sub_configs", None) or {}
    for name, part in parts.items():
        own_part = dict(overrides.get(name, {}))
        if "model_type" in own_part:
            part = CONFIG_MAPPING[own_part.pop("model_type")]
        if part is not AutoConfig and name in fields:
            own[name] = _shrunk(part, own_part).to_dict()
    config: PretrainedConfig = kind(
        **(own | {k: v for k, v in overrides.items() if k not in parts})
    )
    return config
