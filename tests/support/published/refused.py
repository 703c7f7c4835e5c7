"""What prox24 does not prune, in the form in which it is published."""

from __future__ import annotations

from typing import Any

from tests.support.published.form import CLASS, Form, llama_like

_LLAMA = llama_like("LlamaForCausalLM", "llama")
_BERT: dict[str, Any] = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 128,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 259,
}
_T5: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 64,
    "d_kv": 8,
    "d_model": 32,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 128,
    "num_heads": 4,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "vocab_size": 259,
}
_GPTQ = {
    "bits": 4,
    "dataset": "c4",
    "desc_act": False,
    "group_size": 128,
    "quant_method": "gptq",
    "sym": True,
}
_AWQ = {
    "bits": 4,
    "group_size": 128,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
_BNB = {
    "_load_in_4bit": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "load_in_4bit": True,
    "quant_method": "bitsandbytes",
}

FORMS = (
    Form(
        "google-bert/bert-base-uncased",
        _BERT,
        "an encoder (`BertForMaskedLM`)",
        renames=((r"LayerNorm\.weight", "LayerNorm.gamma"), (r"LayerNorm\.bias", "LayerNorm.beta")),
        dtype="float32",
        factory="AutoModelForMaskedLM",
        outcome="BertForMaskedLM",
    ),
    Form(
        "a BertLMHeadModel without is_decoder",
        _BERT | {"architectures": ["BertLMHeadModel"], "is_decoder": False},
        "an encoder under a causal name: attends in both directions",
        dtype="float32",
        outcome="is_decoder",
        source=CLASS,
    ),
    Form(
        "FacebookAI/roberta-base",
        _BERT
        | {
            "architectures": ["RobertaForMaskedLM"],
            "model_type": "roberta",
            "pad_token_id": 1,
            "type_vocab_size": 1,
        },
        "an encoder",
        dtype="float32",
        factory="AutoModelForMaskedLM",
        outcome="RobertaForMaskedLM",
    ),
    Form(
        "google-t5/t5-small",
        _T5,
        "an encoder with a decoder",
        dtype="float32",
        factory="AutoModelForSeq2SeqLM",
        outcome="encoder-decoder",
    ),
    Form(
        "facebook/bart-base",
        {
            "architectures": ["BartModel"],
            "d_model": 32,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 64,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "encoder_layers": 2,
            "is_encoder_decoder": True,
            "max_position_embeddings": 128,
            "model_type": "bart",
            "num_hidden_layers": 2,
            "pad_token_id": 1,
            "vocab_size": 259,
        },
        "an encoder with a decoder, saved without its head",
        dtype="float32",
        factory="AutoModelForSeq2SeqLM",
        outcome="encoder-decoder",
    ),
    Form(
        "TheBloke/Llama-2-7B-GPTQ",
        _LLAMA | {"quantization_config": _GPTQ},
        "GPTQ: `qweight`, `qzeros`, `scales`, `g_idx`",
        change="gptq",
        outcome="gptq",
    ),
    Form(
        "TheBloke/Llama-2-7B-GPTQ (first form)",
        _LLAMA,
        "AutoGPTQ's `quantize_config.json`, nothing in config.json",
        change="old_gptq",
        outcome="GPTQ",
    ),
    Form(
        "TheBloke/Mistral-7B-v0.1-AWQ",
        llama_like("MistralForCausalLM", "mistral", quantization_config=_AWQ),
        "AWQ",
        change="awq",
        outcome="awq",
    ),
    Form(
        "casperhansen/vicuna-7b-v1.5-awq (first form)",
        _LLAMA,
        "AutoAWQ's `quant_config.json`, nothing in config.json",
        change="old_awq",
        outcome="AWQ",
    ),
    Form(
        "unsloth/llama-3-8b-bnb-4bit",
        _LLAMA | {"quantization_config": _BNB},
        "bitsandbytes nf4",
        change="bitsandbytes",
        outcome="bitsandbytes",
    ),
    Form(
        "a model for images and text whose text_config is quantized",
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "image_token_index": 258,
            "model_type": "llava",
            "text_config": {
                k: v for k, v in _LLAMA.items() if k not in ("architectures", "torch_dtype")
            }
            | {"quantization_config": _GPTQ},
            "vision_config": {
                "hidden_size": 16,
                "image_size": 16,
                "intermediate_size": 32,
                "model_type": "clip_vision_model",
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "patch_size": 8,
            },
        },
        "`quantization_config` nested in `text_config`",
        factory="AutoModelForImageTextToText",
        change="gptq",
        outcome="gptq",
        source=CLASS,
    ),
    Form(
        "huggyllama/llama-7b (pickled)",
        _LLAMA,
        "`pytorch_model.bin` alone",
        change="pickled",
        outcome="safetensors",
    ),
    Form(
        "TheBloke/Llama-2-7B-GGUF",
        _LLAMA,
        "a GGUF file alone",
        change="gguf",
        outcome="GGUF",
    ),
    Form(
        "tloen/alpaca-lora-7b (as safetensors)",
        _LLAMA,
        "an adapter alone: `adapter_config.json` and `adapter_model.safetensors`",
        change="adapter_alone",
        outcome="adapter",
    ),
)
"""Refused."""
