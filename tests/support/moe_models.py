"""Tiny random mixtures of experts of several families, and jobs on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tests.support.jobs import prune_here, write_text
from tests.support.tiny_models import VOCABULARY, byte_tokenizer, split_weight_file

HIDDEN, INNER, EXPERTS = 32, 16, 4
LATENT_ATTENTION = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
# What each family's config calls the numbers of its experts.
_OWN: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": INNER},
    "qwen2_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": INNER,
        "shared_expert_intermediate_size": 24,
        "decoder_sparse_step": 1,
        # The first block is dense.
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "head_dim": 8},
    "olmoe": {"num_experts": EXPERTS, "intermediate_size": INNER},
    # Latent attention, a first dense block, and experts that every token passes.
    "deepseek_v2": {
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": INNER,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        **LATENT_ATTENTION,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "deepseek_v3": {
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": INNER,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        **LATENT_ATTENTION,
        "n_group": 2,
        "topk_group": 1,
    },
}
# Of these a block's experts are one stored tensor for each projection.
_TOGETHER: dict[str, dict[str, object]] = {
    # Transposed, gate and up interleaved, biases; a window in the first block.
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "intermediate_size": INNER,
        "head_dim": 8,
        "sliding_window": 8,
    },
    # Transposed, inputs scaled by the router; a dense block, chunks of attention, and no rotary
    # embedding in the second.
    "llama4_text": {
        "num_local_experts": EXPERTS,
        "intermediate_size": INNER,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 8,
    },
    "aria_text": {"moe_num_experts": EXPERTS, "moe_topk": 2, "intermediate_size": INNER},
    # As transformers computes them, under other names.
    "granitemoe": {"num_local_experts": EXPERTS, "intermediate_size": INNER},
}
FAMILIES = tuple(_OWN)
STACKED = tuple(_TOGETHER)
# Their first block has no experts.
FIRST_DENSE = ("qwen2_moe", "deepseek_v2", "deepseek_v3", "llama4_text")


def moe_config(family: str, **overrides: object) -> PreTrainedConfig:
    """The configuration of a tiny mixture of experts of FAMILIES or STACKED, two blocks."""
    common: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    return AutoConfig.for_model(family, **(common | (_OWN | _TOGETHER)[family] | overrides))


def save_moe(
    folder: Path,
    family: str,
    *,
    weight_files: int = 1,
    dtype: torch.dtype = torch.float32,
    **config: object,
) -> Path:
    """Saves a tiny model under the names that its family's checkpoints have, with a tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = loud(AutoModelForCausalLM.from_config(moe_config(family, **config)))
    model.to(dtype).save_pretrained(folder)
    if weight_files > 1:
        split_weight_file(folder, weight_files)
    byte_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def loud(model: PreTrainedModel) -> PreTrainedModel:
    """The model with random weights that are larger than its initialization: the router tells."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "embed" not in name:
            parameter.copy_(0.2 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.1 * torch.randn_like(buffer))
    return model


def token_ids(count: int = 2, seqlen: int = 24) -> Tensor:
    """Random tokens (count, seqlen), the same ones each time."""
    return torch.randint(0, VOCABULARY - 4, (count, seqlen), generator=torch.Generator())


def load(folder: Path) -> PreTrainedModel:
    """The whole model, its experts computed one after another."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="eager"
    )
    return model.eval()


def stacked_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Module path -> every module that holds a block's experts, as transformers made it."""
    return {
        path: module
        for path, module in model.named_modules()
        if _holds_stacks(dict(module.named_parameters(recurse=False)))
    }


def _holds_stacks(parameters: dict[str, nn.Parameter]) -> bool:
    first = parameters.get("gate_up_proj", parameters.get("up_proj"))
    return "down_proj" in parameters and first is not None and first.dim() == 3


def expert_matrices(module: nn.Module, *, together: bool = False) -> dict[str, Tensor]:
    """`3.gate_proj` -> a view (R, C) of each expert's part of the stacked parameters.

    together: gate and up as one, of those that are stored so.
    """
    found = {}
    if together:
        for name in ("gate_up_proj", "down_proj"):
            held = module.get_parameter(name)
            matrices = held.mT if getattr(module, "is_transposed", True) else held
            found |= {f"{number}.{name}": matrix for number, matrix in enumerate(matrices)}
        return found
    if not hasattr(module, "gate_up_proj"):
        for number, (up, last) in enumerate(zip(module.up_proj, module.down_proj, strict=True)):
            found |= {f"{number}.up_proj": up, f"{number}.down_proj": last}
        return found
    for number, (first, last) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
        gate, up = first.chunk(2)
        found |= {f"{number}.gate_proj": gate, f"{number}.up_proj": up, f"{number}.down_proj": last}
    return found


def made_once(folder: Path, job: dict[str, Any]) -> Callable[[str], tuple[Path, Path]]:
    """Family -> (source, output) of a job with the options `job` on its tiny model, made once."""
    found: dict[str, tuple[Path, Path]] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in found:
            source = save_moe(folder / family, family, weight_files=2)
            output = folder / f"{family}-out"
            prune_here(source, output, dataset=str(write_text(folder / "text.txt")), **job)
            found[family] = source, output
        return found[family]

    return make
