"""Dequantization by the libraries that define it: one function for each.

Each result depends only on its own stored value and scale, so a tensor can be computed some rows at
a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from storage.errors import ModelError

DTYPE = torch.bfloat16


def from_fp8(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Weights (..., R, C) in bfloat16 of FP8 values and the scales (..., r, c) of their blocks.

    values: float8 (..., R, C), or two FP4 values a byte, int8 (..., R, C / 2). block: rows and
    columns of a block; the last ones may be cut off. scales: floats, or uint8 exponents of 2.

    transformers computes them. It takes whole blocks only, so blocks that are cut off are padded
    with zeros first.
    """
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    a_byte = 2 if values.dtype == torch.int8 else 1
    rows, columns = values.shape[-2], values.shape[-1] * a_byte
    missing = (-rows % block[0], -columns % block[1])
    whole = pad(values.view(torch.uint8), (0, missing[1] // a_byte, 0, missing[0]))
    if scales.dtype != torch.uint8:
        scales = scales.float()
    made = Fp8Dequantize(None).convert(
        {"weight": whole.view(values.dtype), "weight_scale_inv": scales}
    )
    weights: Tensor = made["weight"][..., :rows, :columns]
    return weights.to(DTYPE).contiguous()


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Weights of experts (E, 32 G, R) in bfloat16 of blocks (E, R, G, 16) and scales (E, R, G).

    blocks: uint8, two FP4 values a byte. scales: uint8 exponents of 2. The result is transposed, as
    the class of gpt-oss holds it. transformers computes it.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    weights: Tensor = convert_moe_packed_tensors(blocks, scales, dtype=DTYPE)
    return weights


def from_compressed(stored: Mapping[str, Tensor], scheme: Mapping[str, Any], form: str) -> Tensor:
    """A linear layer's weight (R, C) in bfloat16, as compressed-tensors decompresses it.

    stored: its tensors by their names in the layer (`weight`, or `weight_packed` and
    `weight_shape`; `weight_scale`, and perhaps `weight_zero_point`). scheme: its group of the
    config. form: its format, such as "pack-quantized". Raises `ModelError` without the library, or
    where it refuses the scheme.
    """
    base, schemes = compressed_tensors()
    try:
        parsed = schemes.model_validate(dict(scheme))
        weight: Tensor = base.get_value_from_registry(form).decompress(dict(stored), parsed)[
            "weight"
        ]
    except Exception as error:  # whatever it thinks of such a scheme
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"compressed-tensors cannot decompress {form} weights: {why}") from error
    return weight.to(DTYPE).contiguous()


def compressed_tensors() -> tuple[Any, Any]:
    """BaseCompressor and QuantizationScheme; `ModelError` without the library."""
    try:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    except ImportError as error:
        raise ModelError(
            "the weights are compressed (quant_method compressed-tensors), which the library of "
            f"that name reads ({error}); install it with pip install 'prox24[compressed]'"
        ) from error
    return BaseCompressor, QuantizationScheme
