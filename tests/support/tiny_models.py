"""Tiny random-weight models of several families, and a byte-level tokenizer, made on the spot.

They prove plumbing, never quality. One byte of text is one token, which makes counting easy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ARCHITECTURES = ("llama", "qwen2", "mistral", "opt")
VOCABULARY = 260  # 256 bytes, three special tokens, one that is never used


def tiny_config(
    architecture: str,
    *,
    blocks: int = 2,
    hidden: int = 32,
    intermediate: int = 64,
    positions: int = 256,
    tied: bool = False,
    **overrides: object,
) -> PretrainedConfig:
    """The transformers configuration of a tiny decoder-only model of one of ARCHITECTURES."""
    common: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    if architecture == "opt":
        common |= {"ffn_dim": intermediate, "word_embed_proj_dim": hidden}
    else:
        common |= {"intermediate_size": intermediate, "num_key_value_heads": 2}
    return AutoConfig.for_model(architecture, **(common | overrides))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte of UTF-8, and no tokens added at either end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        clean_up_tokenization_spaces=False,
    )


def save_tiny_model(
    folder: Path,
    architecture: str = "llama",
    *,
    weight_files: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: bool = True,
    **config: object,
) -> Path:
    """Save a tiny model to `folder` in `weight_files` safetensors files and return `folder`.

    `config`: keywords of `tiny_config`. Deterministic in `seed`, without the global generator.
    """
    random_model(tiny_config(architecture, **config), seed).to(dtype).save_pretrained(folder)
    if weight_files > 1:
        split_weight_file(folder, weight_files)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of the config's own class with random weights, biases and norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        # Biases and norms start at constants, which would hide a mix-up: make them random too.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def change_weights(folder: Path, changes: Mapping[str, Callable[[torch.Tensor], object]]) -> Path:
    """Replaces tensors of `model.safetensors`: name -> function of the fp32 values; dtypes stay."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, change in changes.items():
        value = torch.as_tensor(change(tensors[name].float()))
        tensors[name] = value.to(tensors[name].dtype).contiguous()
    save_file(tensors, path, {"format": "pt"})
    return folder


def largest(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """For `change_weights`: scales a tensor so that its largest magnitude is `value`."""
    return lambda tensor: tensor / tensor.abs().max() * value


def split_weight_file(folder: Path, count: int) -> None:
    """Replace `model.safetensors` by `count` weight files and their index."""
    single = folder / "model.safetensors"
    tensors = load_file(single)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for index in range(count):
        file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        part = names[index * len(names) // count : (index + 1) * len(names) // count]
        weight_map |= dict.fromkeys(part, file)
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    record = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(record, indent=2) + "\n")
    single.unlink()
