"""Layouts of weights in few bits that differ from the usual ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from cluster.command_line import run
from pipeline.formats.open_model import open_model
from tests.support.few_bits import (
    FP4,
    change_config,
    compressed,
    compressed_fp8_model,
    fp8_model,
    group,
    in_blocks,
    int4_model,
    mxfp4_model,
    quantize_files,
    spread,
    to_fp8,
)
from tests.support.few_bits_jobs import (
    BF16,
    JOB,
    NAME,
    OPTIONS,
    WIDE,
    dequantized,
    plain,
    prune,
    refusal,
)
from tests.support.jobs import write_text
from tests.support.moe_models import save_moe, token_ids
from tests.support.multimodal import save_wrapper
from tests.support.tiny_models import save_tiny_model


def test_blocks_that_are_cut_off(tmp_path: Path) -> None:
    """Blocks of the config's size from the first row on, as DeepSeek-V3's 576 rows have them;
    transformers refuses those that do not divide a weight evenly."""
    source = fp8_model(save_tiny_model(tmp_path / "m", "qwen3", dtype=BF16, head_dim=6), (16, 20))
    stored = load_file(source / "model.safetensors")
    files = open_model(source)
    quantized = [name for name in stored if stored[name].dtype == torch.float8_e4m3fn]
    assert len(quantized) == 14
    for name in quantized:
        scales = spread(stored[f"{name}_scale_inv"], (16, 20), stored[name].shape)
        expected = (stored[name].float() * scales).bfloat16()
        assert torch.equal(files.read(name), expected), name
        rows = expected.shape[0]
        for start, stop in ((0, 1), (rows // 2 - 1, rows // 2 + 1), (rows - 3, rows), (3, 3)):
            assert torch.equal(files.read(name, (start, stop)), expected[start:stop])


def test_rows_are_decoded_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes do not depend on how many: here one block of rows, or one expert."""
    experts = save_moe(tmp_path / "gpt_oss", "gpt_oss", dtype=BF16, intermediate_size=32)
    for source in (
        fp8_model(save_tiny_model(tmp_path / "llama", dtype=BF16), (16, 16)),
        mxfp4_model(experts),
    ):
        files = open_model(source)
        whole = {name: files.read(name) for name in files.tensors}
        with monkeypatch.context() as patch:
            patch.setattr("storage.model.few_bits.MADE_BYTES", 1)
            for name, tensor in whole.items():
                assert torch.equal(files.read(name), tensor), name


def test_scales_in_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that holds nothing but scales is not in the output."""
    source = fp8_model(save_tiny_model(tmp_path / "m", dtype=BF16), (16, 16))
    stored = load_file(source / "model.safetensors")
    parts = {
        "model-00001-of-00002.safetensors": [n for n in stored if not n.endswith("_scale_inv")],
        "model-00002-of-00002.safetensors": [n for n in stored if n.endswith("_scale_inv")],
    }
    for file, names in parts.items():
        save_file({name: stored[name] for name in names}, source / file, {"format": "pt"})
    (source / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    output = tmp_path / "output"
    assert prune(source, output, write_text(tmp_path / "text.txt")) == 0
    assert [path.name for path in output.glob("*.safetensors")] == list(parts)[:1]
    assert run(["verify", str(output), "--source", str(source)]) == 0
    model = AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(model.state_dict()["model.norm.weight"], stored["model.norm.weight"])


def test_layers_that_the_class_does_not_load(tmp_path: Path) -> None:
    """DeepSeek-V3's layer after the last predicts further tokens: bfloat16 as well, not pruned."""
    folder = save_moe(tmp_path / "m", "deepseek_v3", dtype=BF16)
    stored = load_file(folder / "model.safetensors")
    last = {name: tensor for name, tensor in stored.items() if "layers.1." in name}
    extra = {n.replace("layers.1.", "layers.2."): tensor.clone() for n, tensor in last.items()}
    extra["model.layers.2.eh_proj.weight"] = torch.randn(32, 64).bfloat16()
    save_file(stored | extra, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, num_nextn_predict_layers=1)
    source = fp8_model(folder, (16, 16))
    files = open_model(source)
    output = tmp_path / "output"
    assert prune(source, output, write_text(tmp_path / "text.txt")) == 0
    assert run(["verify", str(output), "--source", str(source)]) == 0
    found = load_file(output / "model.safetensors")
    assert extra.keys() <= found.keys()
    for name in extra:
        assert torch.equal(found[name], files.read(name)), name
    assert not [name for name, tensor in found.items() if tensor.dtype.itemsize == 1]
    AutoModelForCausalLM.from_pretrained(output)
    assert "layers that predict" in (output / "README.md").read_text()


def test_stacked_experts_in_fp8(tmp_path: Path) -> None:
    """Of a stack (E, R, C) each expert has its blocks: `NAME` and `NAME_scale_inv`."""
    folder = save_moe(tmp_path / "m", "gpt_oss", dtype=BF16, intermediate_size=32)

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        scales = torch.rand(weight.shape[0], weight.shape[1] // 16, weight.shape[2] // 16) + 0.5
        return {name: (weight * 100).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales / 100}

    said = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    ends = ("gate_up_proj", "down_proj")
    source = quantize_files(folder, quantize, said, lambda name: name.endswith(ends))
    stored, files = load_file(source / "model.safetensors"), open_model(source)
    for name in [name for name in stored if name.endswith(ends)]:
        scales = stored[f"{name}_scale_inv"].repeat_interleave(16, 1).repeat_interleave(16, 2)
        assert torch.equal(files.read(name), (stored[name].float() * scales).bfloat16())
        assert torch.equal(files.read(name, (2, 3)), files.read(name)[2:3])
    output = tmp_path / "output"
    assert prune(source, output, write_text(tmp_path / "text.txt")) == 0
    assert run(["verify", str(output), "--source", str(source)]) == 0


def test_fp4_beside_fp8(tmp_path: Path) -> None:
    """DeepSeek-V4's experts are FP4, two values a byte (int8), with exponents for 32 values."""
    source = fp8_model(save_tiny_model(tmp_path / "m", dtype=BF16), (16, 16))
    stored = load_file(source / "model.safetensors")
    codes = torch.randint(0, 16, stored[NAME].shape, dtype=torch.uint8)
    stored[NAME] = (codes[:, 0::2] + 16 * codes[:, 1::2]).view(torch.int8)
    del stored[f"{NAME}_scale_inv"]
    exponents = torch.randint(120, 130, (len(codes), 1), dtype=torch.uint8)
    scale = NAME.removesuffix(".weight") + ".scale"
    stored[scale] = exponents.view(torch.float8_e8m0fnu)
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    files = open_model(source)
    expected = torch.cat([FP4, -FP4])[codes.int()] * torch.exp2(exponents.float() - 127)
    assert torch.equal(files.read(NAME).float(), expected)
    assert torch.equal(files.read(NAME, (5, 9)).float(), expected[5:9])
    assert scale not in files.tensors


@pytest.mark.parametrize(
    ("form", "weights", "zeros"),
    [
        ("pack-quantized", {"num_bits": 4, "strategy": "group", "symmetric": False}, True),
        ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, False),
        ("pack-quantized", {"num_bits": 3, "strategy": "group"}, False),
        ("int-quantized", {"num_bits": 8, "strategy": "channel"}, False),
    ],
)
def test_what_compressed_tensors_compresses(
    tmp_path: Path, form: str, weights: dict[str, Any], zeros: bool
) -> None:
    """Schemes of w4a16 and w8a8 models, compressed by the library itself."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    size = 16 if weights["strategy"] == "group" else None
    own = group(**weights, type="int", group_size=size)
    scheme = schemes.QuantizationScheme.model_validate(own)
    compressor = compressors.BaseCompressor.get_value_from_registry(form)

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        scales = in_blocks(weight, (1, size or weight.shape[1])) / (2 ** weights["num_bits"] / 2)
        stored = {"weight": weight.to(BF16), "weight_scale": scales.to(BF16)}
        if zeros:
            stored["weight_zero_point"] = torch.randint(-3, 4, scales.shape, dtype=torch.int8)
        layer = name.removesuffix("weight")
        return {layer + key: made for key, made in compressor.compress(stored, scheme).items()}

    source = save_tiny_model(tmp_path / "model", dtype=BF16)
    quantize_files(source, quantize, compressed(form, own))
    expected, files = dequantized(source).state_dict(), open_model(source)
    assert files.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(files.read(name), tensor), name
        assert torch.equal(files.read(name, (1, 5)), tensor[1:5]), name


def test_groups_of_layers(tmp_path: Path) -> None:
    """As Kimi's: one group names the experts, int4, and one takes all other linear layers, FP8."""
    pytest.importorskip("compressed_tensors")
    folder = save_moe(tmp_path / "m", "deepseek_v3", dtype=BF16, **WIDE)
    whole = compressed_fp8_model(shutil.copytree(folder, tmp_path / "fp8"))
    packed = int4_model(shutil.copytree(folder, tmp_path / "int4"))
    experts, others = (
        load_file(packed / "model.safetensors"),
        load_file(whole / "model.safetensors"),
    )
    mixed = {name: t for name, t in experts.items() if ".experts." in name}
    mixed |= {name: t for name, t in others.items() if ".experts." not in name}
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    int4 = group(num_bits=4, type="int", strategy="group", group_size=32)
    named = int4 | {"targets": ["re:.*mlp\\.experts\\..*"], "format": "pack-quantized"}
    fp8 = group(num_bits=8, type="float", strategy="channel") | {"format": "float-quantized"}
    said = compressed("mixed-precision", fp8)
    said["config_groups"] = {"group_0": fp8, "group_1": named}
    change_config(folder, quantization_config=said)
    found = open_model(folder)
    for name in found.tensors:
        source = packed if ".experts." in name else whole
        assert torch.equal(found.read(name), open_model(source).read(name)), name


@pytest.mark.parametrize("damage", [False, True])
def test_llama4s_experts_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: bool
) -> None:
    """As Llama-4-FP8 has them; the output has the stacks that the class loads."""
    pytest.importorskip("compressed_tensors")
    source = save_moe(tmp_path / "m", "llama4_text", dtype=BF16)
    stored = load_file(source / "model.safetensors")
    stacks = {name: stored.pop(name) for name in list(stored) if ".experts." in name}
    assert len(stacks) == 2
    for name, stack in stacks.items():
        path, _, last = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        for number, expert in enumerate(stack):
            for part, rows in zip(parts, expert.T.chunk(len(parts)), strict=True):
                stored[f"{path}.{number}.{part}.weight"] = rows.contiguous().clone()
    if damage:
        del stored["model.layers.1.feed_forward.experts.2.up_proj.weight"]
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    compressed_fp8_model(source)
    output, text = tmp_path / "output", write_text(tmp_path / "text.txt")
    if damage:
        job = ["prune", str(source), str(output), *OPTIONS, str(text), *JOB]
        assert "lack model.layers.1.feed_forward.experts.2.up_proj.weight" in refusal(capsys, job)
        return
    expected = dequantized(source).float()
    folder = plain(source, tmp_path / "plain")
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = token_ids()
    with torch.no_grad():
        assert (found(tokens).logits - expected(tokens).logits).abs().max() < 1e-5
    files = open_model(source)
    for name, stack in stacks.items():
        assert files.tensors[name].shape == tuple(stack.shape)
        assert torch.allclose(files.read(name).float(), stack.float(), rtol=0.1, atol=2e-3)
    assert prune(source, output, text) == 0
    assert run(["verify", str(output), "--source", str(source)]) == 0


def test_a_wrapper_that_says_it_of_its_text(tmp_path: Path) -> None:
    """A model for images and text may have `quantization_config` in `text_config` alone."""
    source = save_wrapper(tmp_path / "model", "llava")
    for path in source.glob("*.safetensors"):
        save_file({n: t.to(BF16) for n, t in load_file(path).items()}, path, {"format": "pt"})

    def quantize(name: str, weight: Tensor) -> dict[str, Tensor]:
        values, scales = to_fp8(weight, (16, 16))
        return {name: values, f"{name}_scale_inv": scales}

    said = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    quantize_files(
        source,
        quantize,
        said,
        lambda name: "language_model" in name and name.endswith("_proj.weight"),
    )
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(config))
    output = tmp_path / "output"
    assert prune(source, output, write_text(tmp_path / "text.txt")) == 0
    assert run(["verify", str(output), "--source", str(source)]) == 0
    assert "quantization_config" not in (output / "config.json").read_text()
    AutoModelForImageTextToText.from_pretrained(output)
