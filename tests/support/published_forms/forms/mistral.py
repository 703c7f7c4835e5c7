"""Mistral and the dense Qwens."""

from __future__ import annotations

from tests.support.published_forms.form import Form, llama_like

MISTRAL = "MistralForCausalLM"

FORMS = (
    Form(
        "mistralai/Mistral-7B-v0.1",
        llama_like(MISTRAL, "mistral", sliding_window=8),
        "sliding window; GQA",
        files=2,
        quick=True,
    ),
    Form(
        "mistralai/Mistral-7B-v0.3",
        llama_like(
            MISTRAL, "mistral", sliding_window=None, attention_dropout=0.0, rope_theta=1000000.0
        ),
        "`sliding_window: null`; `consolidated.safetensors` is not part of the folder here",
        files=3,
    ),
    Form(
        "mistralai/Mistral-Nemo-Base-2407",
        llama_like(MISTRAL, "mistral", head_dim=16, sliding_window=None, rope_theta=1000000.0),
        "`head_dim` other than hidden size / heads",
        files=2,
    ),
    Form(
        "mistralai/Ministral-8B-Instruct-2410",
        llama_like(MISTRAL, "mistral", head_dim=8, sliding_window=16, rope_theta=100000000.0),
        "sliding window and `head_dim`",
    ),
    Form(
        "HuggingFaceH4/zephyr-7b-beta",
        llama_like(MISTRAL, "mistral", sliding_window=16, pad_token_id=2),
        "a fine-tuned Mistral; eight weight files",
        files=8,
    ),
    Form(
        "Qwen/Qwen1.5-0.5B",
        llama_like(
            "Qwen2ForCausalLM",
            "qwen2",
            num_key_value_heads=4,
            tie_word_embeddings=True,
            sliding_window=8,
            max_window_layers=21,
            use_sliding_window=False,
            rms_norm_eps=1e-06,
            attention_dropout=0.0,
            rope_theta=1000000.0,
        ),
        "`sliding_window` given and switched off; biases of q, k, v; tied",
    ),
    Form(
        "Qwen/Qwen2-7B",
        llama_like(
            "Qwen2ForCausalLM",
            "qwen2",
            sliding_window=131072,
            max_window_layers=28,
            use_sliding_window=False,
            rope_theta=1000000.0,
        ),
        "GQA; untied",
        files=4,
    ),
    Form(
        "Qwen/Qwen2.5-7B-Instruct-1M",
        llama_like(
            "Qwen2ForCausalLM",
            "qwen2",
            use_sliding_window=False,
            sliding_window=8,
            max_window_layers=1,
            rope_theta=10000000.0,
            dual_chunk_attention_config={
                "chunk_size": 64,
                "local_size": 8,
                "original_max_position_embeddings": 64,
            },
        ),
        "a `dual_chunk_attention_config` that the class does not know",
    ),
    Form(
        "Qwen/Qwen2.5-72B with YaRN",
        llama_like(
            "Qwen2ForCausalLM",
            "qwen2",
            rope_scaling={
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "type": "yarn",
            },
            use_sliding_window=False,
        ),
        "`rope_scaling` of `type: yarn`, as its card tells to add",
    ),
    Form(
        "Qwen/Qwen3-8B",
        llama_like(
            "Qwen3ForCausalLM",
            "qwen3",
            attention_bias=False,
            attention_dropout=0.0,
            head_dim=16,
            max_window_layers=36,
            rope_scaling=None,
            rope_theta=1000000,
            sliding_window=None,
            use_sliding_window=False,
            rms_norm_eps=1e-06,
        ),
        "norms of q and k; `head_dim`",
        files=5,
    ),
    Form(
        "Qwen/Qwen3-0.6B",
        llama_like(
            "Qwen3ForCausalLM",
            "qwen3",
            head_dim=16,
            tie_word_embeddings=True,
            attention_bias=False,
            sliding_window=None,
            use_sliding_window=False,
        ),
        "tied in its config, and `lm_head.weight` stored too",
        extra={"lm_head.weight": ("same as the embedding", (259, 32))},
    ),
    Form(
        "Qwen/Qwen3-Embedding-0.6B",
        llama_like("Qwen3ForCausalLM", "qwen3", head_dim=16, tie_word_embeddings=True),
        "saved from the base model: names without `model.`",
        renames=((r"^model\.", ""),),
    ),
    Form(
        "Qwen/Qwen3-8B-FP8",
        llama_like(
            "Qwen3ForCausalLM",
            "qwen3",
            head_dim=16,
            attention_bias=False,
            quantization_config={
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            },
        ),
        "FP8, `weight_scale_inv` by blocks of 128 x 128",
        change="fp8_blocks",
    ),
)
