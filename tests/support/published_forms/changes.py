"""What is done to a folder after it was made: other formats, files that are missing, adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_LINEAR = "proj.weight"


def _weights(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "model.safetensors"
    return path, load_file(path)


def gptq(folder: Path) -> None:
    """Linears of blocks as AutoGPTQ stores them: packed integers, zeros, scales, group index."""
    path, tensors = _weights(folder)
    for name in [n for n in tensors if n.endswith(_LINEAR) and "vision" not in n]:
        rows, columns = tensors.pop(name).shape
        base = name.removesuffix("weight")
        tensors[base + "qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        tensors[base + "qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)
        tensors[base + "scales"] = torch.ones(1, rows, dtype=torch.float16)
        tensors[base + "g_idx"] = torch.zeros(columns, dtype=torch.int32)
    save_file(tensors, path, {"format": "pt"})


def old_gptq(folder: Path) -> None:
    """As `gptq`, with quantize_config.json in place of a quantization_config."""
    gptq(folder)
    record = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
    (folder / "quantize_config.json").write_text(json.dumps(record))


def awq(folder: Path) -> None:
    """Linears of blocks as AutoAWQ stores them (packed along the rows)."""
    path, tensors = _weights(folder)
    for name in [n for n in tensors if n.endswith(_LINEAR) and "vision" not in n]:
        rows, columns = tensors.pop(name).shape
        base = name.removesuffix("weight")
        tensors[base + "qweight"] = torch.zeros(columns, rows // 8, dtype=torch.int32)
        tensors[base + "qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)
        tensors[base + "scales"] = torch.ones(1, rows, dtype=torch.float16)
    save_file(tensors, path, {"format": "pt"})


def old_awq(folder: Path) -> None:
    """As `awq`, with quant_config.json in place of a quantization_config."""
    awq(folder)
    record = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    (folder / "quant_config.json").write_text(json.dumps(record))


def bitsandbytes(folder: Path) -> None:
    """Linears of blocks as bitsandbytes stores nf4: bytes, absmax, maps, state."""
    path, tensors = _weights(folder)
    for name in [n for n in tensors if n.endswith(_LINEAR) and "vision" not in n]:
        count = tensors[name].numel()
        tensors[name] = torch.zeros(count // 2, 1, dtype=torch.uint8)
        tensors[name + ".absmax"] = torch.zeros(count // 64, dtype=torch.uint8)
        tensors[name + ".quant_map"] = torch.zeros(16)
        tensors[name + ".quant_state.bitsandbytes__nf4"] = torch.zeros(80, dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})


def fp8_blocks(folder: Path) -> None:
    """Linears of blocks in float8 with a scale for each block of 128 x 128 (`weight_scale_inv`)."""
    path, tensors = _weights(folder)
    for name in [n for n in tensors if n.endswith(_LINEAR) and "vision" not in n]:
        value = tensors[name].float()
        rows, columns = (-(-size // 128) for size in value.shape)
        scale = value.abs().max() / 448.0
        tensors[name] = (value / scale).to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.full((rows, columns), float(scale))
    save_file(tensors, path, {"format": "pt"})


def mxfp4(folder: Path) -> None:
    """Stacked experts in four bits: `_blocks` (E, rows, groups, 16) and `_scales`, of 32 inputs."""
    path, tensors = _weights(folder)
    generator = torch.Generator().manual_seed(1)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[name + "_blocks"] = torch.randint(
            0, 256, (*shape, 16), dtype=torch.uint8, generator=generator
        )
        tensors[name + "_scales"] = torch.randint(
            122, 126, shape, dtype=torch.uint8, generator=generator
        )
    save_file(tensors, path, {"format": "pt"})


def pickled(folder: Path) -> None:
    """`pytorch_model.bin` alone. Its contents play no part: it is not to be opened."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(64))


def gguf(folder: Path) -> None:
    """A GGUF file alone."""
    (folder / "model.safetensors").unlink()
    (folder / "model-q4_k_m.gguf").write_bytes(b"GGUF" + bytes(64))


def adapter_alone(folder: Path) -> None:
    """What peft saves: an adapter's config and weights, no model."""
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(4, 32)}, folder / "adapter_model.safetensors", {"format": "pt"})
    adapter_beside(folder)


def adapter_beside(folder: Path) -> None:
    """The config of an adapter beside a whole model."""
    record = {"peft_type": "LORA", "base_model_name_or_path": "x/y", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(record))


def own_code(folder: Path) -> None:
    """The Python files that `auto_map` names."""
    named = json.loads((folder / "config.json").read_text())["auto_map"]
    for value in named.values():
        (folder / (value.split(".")[0] + ".py")).write_text("raise RuntimeError('was run')\n")


def sharded_index_extra(folder: Path) -> None:
    """An index that names a tensor which no weight file holds, and which nothing loads."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = file
    path.write_text(json.dumps(index))


def olmo_hybrid_names(folder: Path) -> None:
    """The convolutions of q, k and v apart, as published, where the class stacks them."""
    path, tensors = _weights(folder)
    for name in [n for n in tensors if n.endswith("linear_attn.conv1d.weight")]:
        base = name.removesuffix("conv1d.weight")
        q, k, v = tensors.pop(name).split([16, 16, 32])
        for letter, part in (("q", q), ("k", k), ("v", v)):
            tensors[f"{base}{letter}_conv1d.weight"] = part.contiguous()
    for name in [n for n in tensors if "linear_attn" in n]:
        block = name.split("linear_attn")[0]
        for theirs, own in (
            ("attention_layer_norm", "input_layernorm"),
            ("feedforward_layer_norm", "post_attention_layernorm"),
        ):
            if (value := tensors.pop(f"{block}{own}.weight", None)) is not None:
                tensors[f"{block}{theirs}.weight"] = value
    save_file(tensors, path, {"format": "pt"})


CHANGES: dict[str, Callable[[Path], None]] = {
    change.__name__: change
    for change in (
        gptq,
        old_gptq,
        awq,
        old_awq,
        bitsandbytes,
        fp8_blocks,
        mxfp4,
        pickled,
        gguf,
        adapter_alone,
        adapter_beside,
        own_code,
        olmo_hybrid_names,
        sharded_index_extra,
    )
}
