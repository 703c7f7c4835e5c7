"""Tiny models whose blocks hold more than linear layers: convolutions, state spaces, routers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.moe_models import loud
from tests.support.tiny_models import VOCABULARY, byte_tokenizer


@dataclass(frozen=True)
class Hybrid:
    """A tiny model of a family.

    options: of its config. stays: endings of its linear layers' names that are not pruned.
    together: whether gate and up of an expert are stored as one. kinds: how many sorts of block it
    has. quick: whether it is among the quick tests.
    """

    options: dict[str, Any]
    stays: tuple[str, ...] = ()
    together: bool = False
    kinds: int = 2
    quick: bool = False
    common: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "pad_token_id": 258,
        }
    )


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_CONV = {"layer_types": ["conv", "full_attention"]}

HYBRIDS: dict[str, Hybrid] = {
    "qwen3_next": Hybrid(
        {**_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 16},
        stays=("shared_expert_gate",),
        quick=True,
    ),
    "qwen3_5_text": Hybrid(_DELTA),
    "granitemoehybrid": Hybrid(
        {
            **_MAMBA2,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 48,
        },
        together=True,
    ),
    "nemotron_h": Hybrid(
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "moe", "attention", "mlp"],
            "head_dim": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
        },
        kinds=4,
        quick=True,
    ),
    "lfm2": Hybrid({**_CONV, "block_auto_adjust_ff_dim": False}, quick=True),
    "lfm2_moe": Hybrid({**_CONV, **_EXPERTS, "num_dense_layers": 1}),
    "falcon_h1": Hybrid({**_MAMBA2, "head_dim": 8, "mamba_d_ssm": 64}, kinds=1),
    "bamba": Hybrid({**_MAMBA2, "attn_layer_indices": [1]}),
    "jamba": Hybrid(
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        stays=("dt_proj",),
    ),
    # Its convolution is stored as three, of queries, keys and values.
    "olmo_hybrid": Hybrid({**_DELTA, "linear_num_key_heads": 4, "num_key_value_heads": 4}),
    "hunyuan_v1_moe": Hybrid(
        {"head_dim": 8, "num_experts": 4, "moe_topk": 2}, stays=("gate.wg",), kinds=1, quick=True
    ),
    "ernie4_5_moe": Hybrid(
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        }
    ),
    # Command-R+: the norms of queries and keys have a row for each head.
    "cohere": Hybrid({"use_qk_norm": True}, kinds=1),
}


def save_hybrid(folder: Path, family: str) -> Path:
    """Saves a tiny model of HYBRIDS under the names of its published checkpoints."""
    hybrid = HYBRIDS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **(hybrid.common | hybrid.options))
        model = loud(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
