"""Tiny models stored in few bits, in the layouts in which others publish them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.jobs import is_linear_of_a_block

# The eight positive values of FP4 (E2M1); the fourth bit is the sign.
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def quantize_files(
    folder: Path,
    quantize: Callable[[str, Tensor], Mapping[str, Tensor] | None],
    quantization: Mapping[str, Any],
    which: Callable[[str], bool] = is_linear_of_a_block,
) -> Path:
    """Stores the tensors `which` of every weight file as what `quantize(name, tensor)` makes of
    them (None: as they are), and says so in config.json; the index is made anew."""
    weight_map, total = {}, 0
    for path in sorted(folder.glob("*.safetensors")):
        stored: dict[str, Tensor] = {}
        for name, tensor in load_file(path).items():
            made = quantize(name, tensor.float()) if which(name) else None
            stored |= {name: tensor.clone()} if made is None else made
        save_file({n: t.contiguous() for n, t in stored.items()}, path, {"format": "pt"})
        weight_map |= dict.fromkeys(stored, path.name)
        total += sum(t.numel() * t.element_size() for t in stored.values())
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    change_config(folder, quantization_config=dict(quantization))
    return folder


def change_config(folder: Path, **changes: object) -> None:
    """Sets keys of a model folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def in_blocks(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each block of a weight (R, C), those at the edges cut off."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.abs(), (0, -columns % block[1], 0, -rows % block[0]))
    shape = (padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    return padded.reshape(shape).amax(dim=(1, 3)).clamp_min(1e-12)


def spread(scales: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """Scales of blocks (r, c), one for each value of a weight (R, C)."""
    wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


def to_fp8(weight: Tensor, block: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """FP8 values, and the scale of each block, or of the whole, that they are multiplied by."""
    size = block or (weight.shape[0], weight.shape[1])
    scales = in_blocks(weight, size) / 448
    values = (weight / spread(scales, size, weight.shape)).to(torch.float8_e4m3fn)
    return values, scales if block else scales.reshape(())


def fp8_model(folder: Path, block: tuple[int, int] | None = (128, 128), **said: object) -> Path:
    """As DeepSeek-V3 and Qwen3-FP8 are published; without blocks as Mistral's are."""

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        values, scales = to_fp8(weight, block)
        return {name: values, f"{name}_scale_inv": scales}

    quantization: dict[str, object] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": None if block is None else list(block),
    }
    return quantize_files(folder, quantize, quantization | said)


def to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks (E, R, G, 16) and scales (E, R, G) of weights (E, C, R) with C = 32 G."""
    groups = weight.mT.reshape(weight.shape[0], weight.shape[2], -1, 32)
    exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp_min(2**-100))) - 2
    scaled = groups / torch.exp2(exponent)[..., None]
    codes = (scaled.abs()[..., None] - FP4).abs().argmin(-1) + 8 * (scaled < 0)
    packed = codes[..., 0::2] + 16 * codes[..., 1::2]
    return packed.to(torch.uint8), (exponent + 127).to(torch.uint8)


def mxfp4_model(folder: Path) -> Path:
    """As gpt-oss is published: only the experts' matrices are quantized."""

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        blocks, scales = to_mxfp4(weight)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    quantization = {
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router",
            "model.embed_tokens", "lm_head",
        ],
        "quant_method": "mxfp4",
    }  # fmt: skip
    which = ("gate_up_proj", "down_proj")
    return quantize_files(folder, quantize, quantization, lambda name: name.endswith(which))


def group(**weights: object) -> dict[str, object]:
    """A group of a compressed-tensors config, of all linear layers."""
    common: dict[str, object] = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": None,
        "observer": "minmax", "observer_kwargs": {}, "symmetric": True,
    }  # fmt: skip
    return {
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": common | weights,
    }


def compressed(form: str, own: object, **more: object) -> dict[str, object]:
    """The `quantization_config` of a model that compressed-tensors compressed."""
    return {
        "config_groups": {"group_0": own},
        "format": form,
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    } | more


def compressed_fp8_model(folder: Path, strategy: str = "channel") -> Path:
    """As RedHat's FP8-dynamic models and Llama-4-FP8 are published: a scale for each row."""

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        block = {
            "channel": (1, weight.shape[1]),
            "tensor": (weight.shape[0], weight.shape[1]),
            "block": (16, 16),
        }[strategy]
        values, scales = to_fp8(weight, block)
        scales = scales.reshape(1) if strategy == "tensor" else scales
        scales = scales.bfloat16()
        return {name: values, f"{name}_scale": scales}

    blocks = [16, 16] if strategy == "block" else None
    own = group(num_bits=8, type="float", strategy=strategy, block_structure=blocks)
    return quantize_files(folder, quantize, compressed("float-quantized", own))


def int4_model(folder: Path, size: int = 32) -> Path:
    """As Kimi-K2-Thinking is published: eight values in an int32, a scale for each group."""

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        block = (1, size)
        scales = (in_blocks(weight, block) / 7.5).bfloat16()
        values = weight / spread(scales.float(), block, weight.shape)
        codes = (values.round().clamp(-8, 7) + 8).to(torch.int64)
        codes = codes.reshape(weight.shape[0], -1, 8)
        packed = sum(codes[..., i] << (4 * i) for i in range(8))
        assert isinstance(packed, Tensor)
        layer = name.removesuffix(".weight")
        return {
            f"{layer}.weight_packed": packed.to(torch.int32),
            f"{layer}.weight_scale": scales,
            f"{layer}.weight_shape": torch.tensor(weight.shape, dtype=torch.int32),
        }

    own = group(num_bits=4, type="int", strategy="group", group_size=size)
    return quantize_files(folder, quantize, compressed("pack-quantized", own))
