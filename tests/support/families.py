"""The dense families that prox24 is held to prune, each as a tiny model, and what each looks like.

What is written here is what transformers made of the families when it was last looked at: a version
that changes one of them fails tests/models/test_families.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from tests.support.tiny_models import VOCABULARY

TESTED = "5.23.0"
"""The transformers that the tests ran on; docs/models.md says so too."""

Groups = tuple[tuple[str, ...], ...]

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUT, _GATED, _DOWN = ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)
LLAMA: Groups = (_QKV, _OUT, _GATED, _DOWN)
FUSED: Groups = (_OUT, ("self_attn.qkv_proj",), ("mlp.gate_up_proj",), _DOWN)
GLM: Groups = (_QKV, _OUT, ("mlp.gate_up_proj",), _DOWN)
UNGATED: Groups = (_QKV, _OUT, ("mlp.up_proj",), _DOWN)
PARALLEL: Groups = ((*_QKV, *_GATED), _OUT, _DOWN)
STARCODER: Groups = (_QKV, _OUT, ("mlp.c_fc",), ("mlp.c_proj",))
OPT: Groups = (
    ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
    ("self_attn.out_proj",),
    ("fc1",),
    ("fc2",),
)
GPT2: Groups = (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))
GPTJ: Groups = (
    ("attn.k_proj", "attn.v_proj", "attn.q_proj", "mlp.fc_in"),
    ("attn.out_proj",),
    ("mlp.fc_out",),
)
PHI: Groups = ((*_QKV, "mlp.fc1"), ("self_attn.dense",), ("mlp.fc2",))
_BIG = ("query_key_value", "dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
MPT: Groups = (("attn.Wqkv",), ("attn.out_proj",), ("ffn.up_proj",), ("ffn.down_proj",))


def _big(attention: str, parallel: bool = False) -> Groups:
    """The layers of GPT-NeoX and its kin; `parallel`: one norm feeds attention and MLP."""
    qkv, dense = f"{attention}.query_key_value", f"{attention}.dense"
    if parallel:
        return (qkv, _BIG[2]), (dense,), (_BIG[3],)
    return (qkv,), (dense,), (_BIG[2],), (_BIG[3],)


@dataclass(frozen=True)
class Family:
    """A tiny model of a family.

    model_type and options make its config; blocks and groups: where its blocks are, and the layers
    of a block by the input that they share. title: its name in docs/models.md, None for a variant.
    transposed: whether its linears are Conv1D. quick: whether it is pruned in the quick tests.
    """

    model_type: str
    title: str | None
    options: dict[str, Any]
    groups: Groups = LLAMA
    blocks: str = "model.layers"
    transposed: bool = False
    quick: bool = True
    common: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        """The linears of a block."""
        return tuple(layer for group in self.groups for layer in group)

    def config(self) -> PretrainedConfig:
        """The tiny model's config: two blocks, hidden size 32."""
        tokens = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
        return AutoConfig.for_model(
            self.model_type, vocab_size=VOCABULARY, **tokens, **(self.common | self.options)
        )


_SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL = _SIZE | {
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
# Of two blocks one sees eight tokens, the other all.
_WINDOWS = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _like_llama(
    model_type: str, title: str | None, groups: Groups = LLAMA, quick: bool = True, **options: Any
) -> Family:
    return Family(model_type, title, options, groups, quick=quick, common=_SMALL)


FAMILIES: dict[str, Family] = {
    "llama": _like_llama("llama", "Llama 2"),
    "llama 3": _like_llama(
        "llama",
        "Llama 3",
        quick=False,
        rope_parameters=_LLAMA3,
        tie_word_embeddings=True,
        attention_bias=True,
    ),
    "mistral": _like_llama("mistral", "Mistral", sliding_window=8),
    "qwen2": _like_llama(
        "qwen2",
        "Qwen2",
        use_sliding_window=True,
        max_window_layers=1,
        sliding_window=8,
    ),
    "qwen3": _like_llama("qwen3", "Qwen3", quick=False, head_dim=16),
    "gemma2": _like_llama("gemma2", "Gemma 2", head_dim=16, query_pre_attn_scalar=16, **_WINDOWS),
    "gemma3": _like_llama(
        "gemma3_text", "Gemma 3", head_dim=16, query_pre_attn_scalar=16, **_WINDOWS
    ),
    "phi3": _like_llama("phi3", "Phi-3", FUSED),
    "opt": Family(
        "opt",
        "OPT",
        {"ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 128},
        OPT,
        "model.decoder.layers",
        common=_SIZE,
    ),
    "opt, norm last": Family(
        "opt",
        None,
        {
            "ffn_dim": 64,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": 128,
            "do_layer_norm_before": False,
        },
        OPT,
        "model.decoder.layers",
        quick=False,
        common=_SIZE,
    ),
    "gpt2": Family("gpt2", "GPT-2", _GPT2, GPT2, "transformer.h", transposed=True),
    "gpt_neox": Family(
        "gpt_neox",
        "GPT-NeoX, Pythia",
        {"intermediate_size": 64, "max_position_embeddings": 128},
        _big("attention"),
        "gpt_neox.layers",
        common=_SIZE,
    ),
    "falcon": Family(
        "falcon",
        "Falcon",
        {},
        _big("self_attention", parallel=True),
        "transformer.h",
        common=_SIZE,
    ),
    "falcon, new": Family(
        "falcon",
        None,
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        _big("self_attention"),
        "transformer.h",
        quick=False,
        common=_SIZE,
    ),
    "falcon, alibi": Family(
        "falcon",
        None,
        {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True},
        _big("self_attention"),
        "transformer.h",
        quick=False,
        common=_SIZE,
    ),
    "bloom": Family(
        "bloom",
        "BLOOM",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        _big("self_attention"),
        "transformer.h",
    ),
    "olmo2": _like_llama("olmo2", "OLMo 2", quick=False),
    "granite": _like_llama(
        "granite",
        "Granite",
        quick=False,
        embedding_multiplier=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.4,
        logits_scaling=2.0,
    ),
    # No rotary embedding in the second block.
    "smollm3": _like_llama("smollm3", "SmolLM3", no_rope_layers=[1, 0]),
    "starcoder2": _like_llama(
        "starcoder2", "StarCoder2", STARCODER, use_bias=True, sliding_window=8
    ),
    "cohere2": _like_llama("cohere2", "Cohere 2", PARALLEL, quick=False, **_WINDOWS),
    "glm4": _like_llama("glm4", "GLM-4", GLM, quick=False, head_dim=8),
    "gptj": Family("gptj", "GPT-J", {**_GPT2, "rotary_dim": 4}, GPTJ, "transformer.h", quick=False),
    "mpt": Family(
        "mpt",
        "MPT",
        {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
        MPT,
        "transformer.blocks",
        quick=False,
    ),
    "nemotron": _like_llama("nemotron", "Nemotron", UNGATED, quick=False),
    "olmo3": _like_llama("olmo3", "OLMo 3", quick=False, **_WINDOWS),
    "phi": _like_llama("phi", "Phi-2", PHI, quick=False),
    "stablelm": _like_llama("stablelm", "StableLM", quick=False),
}
