"""What the libraries' dequantization gives for values that are known: fails when it changes."""

from __future__ import annotations

import pytest
import torch

from pipeline.formats.dequantize import from_compressed, from_fp8, from_mxfp4
from storage.errors import ModelError
from tests.support.few_bits import FP4, group

BF16 = torch.bfloat16


def test_fp8() -> None:
    """A value times its block's scale in float32, rounded once; the last blocks are cut off."""
    values = torch.tensor([[1.0, -2.0, 448.0], [0.0, 3.5, 2**-9], [1.125, 1.0, 1.0]])
    scales = torch.tensor([[0.3, 2.0], [1.0, 3.0]])
    wide = torch.tensor([[0.3, 0.3, 2.0], [0.3, 0.3, 2.0], [1.0, 1.0, 3.0]])
    found = from_fp8(values.to(torch.float8_e4m3fn), scales, (2, 2))
    assert found.dtype == BF16
    assert torch.equal(found, (values * wide).to(BF16))
    # Also where the scales are rounded, and where the last block is the only one.
    half = from_fp8(values.to(torch.float8_e5m2), scales[:1, :1].bfloat16(), (128, 128))
    rounded = values.to(torch.float8_e5m2).float() * scales[0, 0].bfloat16().float()
    assert torch.equal(half, rounded.to(BF16))


def test_fp8_with_exponents() -> None:
    """MXFP8 has a byte for each scale, an exponent of 2, whichever dtype says so."""
    values = torch.tensor([[1.0, -2.0], [4.0, 8.0]]).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[126, 130]], dtype=torch.uint8)
    expected = values.float() * torch.tensor([0.5, 8.0])
    for scales in (exponents, exponents.view(torch.float8_e8m0fnu)):
        assert torch.equal(from_fp8(values, scales, (2, 1)).float(), expected)


def test_fp8_not_a_number() -> None:
    """An FP8 NaN and a NaN scale stay what they are: the model is refused for them."""
    values = torch.tensor([[1.0, float("nan")]]).to(torch.float8_e4m3fn)
    assert from_fp8(values, torch.ones(1, 1), (1, 2)).isnan().tolist() == [[False, True]]
    assert from_fp8(values, torch.full((1, 1), torch.nan), (1, 2)).isnan().all()


def test_fp4_in_bytes() -> None:
    """Two FP4 values a byte, the lower half first, each 4 of them with a scale."""
    codes = torch.arange(16, dtype=torch.uint8)
    packed = (codes[0::2] + 16 * codes[1::2]).view(torch.int8)[None]
    scales = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    found = from_fp8(packed, scales, (1, 4))
    expected = torch.cat([FP4, -FP4]) * scales[0].repeat_interleave(4)
    assert torch.equal(found.float()[0], expected)


def test_mxfp4() -> None:
    """Blocks of 32 values along a row, the lower half of a byte first, times a power of 2; experts
    come out transposed."""
    codes = torch.arange(32, dtype=torch.uint8) % 16
    row = (codes[0::2] + 16 * codes[1::2])[None]  # a block
    blocks = torch.stack([row, row.flip(-1)])[None]  # (1, 2, 1, 16)
    scales = torch.tensor([[[127], [125]]], dtype=torch.uint8)
    found = from_mxfp4(blocks, scales)
    assert found.shape == (1, 32, 2)
    assert found.dtype == BF16
    values = torch.cat([FP4, -FP4]).repeat(2)
    assert torch.equal(found[0, :, 0].float(), values)
    assert torch.equal(found[0, :, 1].float(), values.reshape(16, 2).flip(0).flatten() / 4)


def test_compressed_fp8() -> None:
    pytest.importorskip("compressed_tensors")
    values = torch.tensor([[1.0, -2.0, 448.0], [0.0, 3.5, 2**-9]])
    stored = {
        "weight": values.to(torch.float8_e4m3fn),
        "weight_scale": torch.tensor([[0.3], [2.0]]),
    }
    scheme = group(num_bits=8, type="float", strategy="channel")
    found = from_compressed(stored, scheme, "float-quantized")
    assert torch.equal(found, (values * stored["weight_scale"]).to(BF16))


def test_int4() -> None:
    """Eight values an int32, the first in the lowest bits, 8 above what they mean."""
    pytest.importorskip("compressed_tensors")
    packed = torch.tensor([[0x76543210, 0xFEDCBA98 - 2**32]], dtype=torch.int32)
    stored = {
        "weight_packed": packed,
        "weight_scale": torch.tensor([[0.5, 2.0]], dtype=BF16),
        "weight_shape": torch.tensor([1, 16]),
    }
    scheme = group(num_bits=4, type="int", strategy="group", group_size=8)
    found = from_compressed(stored, scheme, "pack-quantized")
    expected = torch.arange(-8, 8) * torch.tensor([0.5, 2.0]).repeat_interleave(8)
    assert torch.equal(found.float()[0], expected)


def test_a_scheme_that_the_library_refuses() -> None:
    pytest.importorskip("compressed_tensors")
    with pytest.raises(ModelError, match="cannot decompress") as caught:
        from_compressed({}, {"weights": {"num_bits": "many"}}, "float-quantized")
    assert "\n" not in str(caught.value)
