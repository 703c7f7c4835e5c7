"""Checkpoints in few bits, as they are published: read in place, pruned, written as bfloat16."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
)

from cluster.command_line import run
from pipeline.formats.open_model import open_model
from storage.errors import CorruptFileError
from storage.model.files import fingerprint_weight_file
from storage.object_store import ObjectFolder
from tests.storage.test_object_store import put
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
from tests.support.jobs import write_text
from tests.support.moe_models import save_moe, token_ids
from tests.support.multimodal import save_wrapper
from tests.support.s3_server import S3Server
from tests.support.tiny_models import byte_tokenizer, save_tiny_model

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 dequantizes otherwise"
)

BF16 = torch.bfloat16
NAME = "model.layers.1.mlp.up_proj.weight"
# What is a multiple of 32 where int4 has groups of that size.
WIDE = {"moe_intermediate_size": 32, "intermediate_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32}

LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "qwen3 fp8": lambda f: fp8_model(
        save_tiny_model(f, "qwen3", weight_files=2, dtype=BF16, head_dim=8), (16, 16)
    ),
    "deepseek_v3 fp8": lambda f: fp8_model(
        save_moe(f, "deepseek_v3", weight_files=2, dtype=BF16), (128, 128)
    ),
    "llama fp8 per tensor": lambda f: fp8_model(save_tiny_model(f, dtype=BF16), None),
    "gpt_oss mxfp4": lambda f: mxfp4_model(
        save_moe(f, "gpt_oss", weight_files=2, dtype=BF16, intermediate_size=32)
    ),
    "llama compressed fp8": lambda f: compressed_fp8_model(save_tiny_model(f, dtype=BF16)),
    "deepseek_v3 int4": lambda f: int4_model(save_moe(f, "deepseek_v3", dtype=BF16, **WIDE)),
}
STORED_AS = {
    "qwen3 fp8": "FP8 in blocks of 16 x 16",
    "deepseek_v3 fp8": "FP8 in blocks of 128 x 128",
    "llama fp8 per tensor": "FP8",
    "gpt_oss mxfp4": "MXFP4",
    "llama compressed fp8": "compressed-tensors (float-quantized)",
    "deepseek_v3 int4": "compressed-tensors (pack-quantized)",
}
COMPRESSED = ("llama compressed fp8", "deepseek_v3 int4")
SLOW = ("llama fp8 per tensor", "llama compressed fp8")
OPTIONS = ["--executor", "local", "--threads", "1", "--dataset"]
JOB = ["--method", "wanda", "--nsamples", "8", "--seqlen", "32", "--no-report"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Layout -> the folder with its `source`, made once; and `text.txt` beside it."""
    found: dict[str, Path] = {}

    def make(layout: str) -> Path:
        if layout not in found:
            folder = tmp_path_factory.mktemp("few-bits")
            write_text(folder / "text.txt")
            LAYOUTS[layout](folder / "source")
            found[layout] = folder
        return found[layout]

    return make


@pytest.fixture(params=[pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in LAYOUTS])
def layout(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name in COMPRESSED:
        pytest.importorskip("compressed_tensors")
    return name


def dequantized(folder: Path, layout: str) -> PreTrainedModel:
    """What transformers makes of a model when it is told to dequantize it."""
    how: Any = FineGrainedFP8Config
    if "mxfp4" in layout:
        how = Mxfp4Config
    elif layout in COMPRESSED:
        how = CompressedTensorsConfig
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=BF16, quantization_config=how(dequantize=True), experts_implementation="eager"
    )
    return model.eval()


def plain(source: Path, target: Path) -> Path:
    """The bfloat16 model that prox24 sees, put on the disk."""
    files = open_model(source)
    shutil.copytree(files.folder, target)
    for name in files.files:
        with files.source.open(name) as stream:
            (target / name).write_bytes(stream.read(files.size(name)))
    return target


def prune(source: Path, output: Path, text: Path) -> int:
    return run(["prune", str(source), str(output), *OPTIONS, str(text), *JOB])


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """The one line that a command prints to stderr when it refuses."""
    capsys.readouterr()
    assert run(arguments) == code
    message = capsys.readouterr().err.strip()
    assert message.splitlines()[-1].startswith("prox24: "), message
    return message.splitlines()[-1]


# -- as transformers dequantizes ------------------------------------------------------------------


def test_every_byte_is_that_of_transformers(
    made: Callable[[str], Path], layout: str, tmp_path: Path
) -> None:
    source = made(layout) / "source"
    expected = dequantized(source, layout).state_dict()
    folder = plain(source, tmp_path / "plain")
    found = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    names = {name for path in folder.glob("*.safetensors") for name in load_file(path)}
    assert not [name for name in names if "scale" in name or "packed" in name or "blocks" in name]


def test_the_whole_way(
    made: Callable[[str], Path], layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pruned as the dequantized model is, to the byte; sound by `verify`; loaded by transformers;
    as large as `plan` says."""
    folder = made(layout)
    source, text, output = folder / "source", folder / "text.txt", tmp_path / "output"
    dense = plain(source, tmp_path / "dense")
    assert prune(source, output, text) == 0
    assert prune(dense, tmp_path / "same", text) == 0
    weights = sorted(path.name for path in output.glob("*.safetensors*"))
    assert weights == sorted(path.name for path in dense.glob("*.safetensors*"))
    for name in [*weights, "config.json"]:
        assert (output / name).read_bytes() == (tmp_path / "same" / name).read_bytes(), name
    capsys.readouterr()
    for against in (source, dense):
        assert run(["verify", str(output), "--source", str(against), "--json"]) == 0
        assert printed(capsys)["problems"] == []

    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    card = (output / "README.md").read_text()
    assert f"({STORED_AS[layout]}) were dequantized to bfloat16" in card
    results = json.loads((output / "prox24.json").read_text())
    assert results["source_stored_as"] == STORED_AS[layout]
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == BF16

    assert run(["plan", str(source), "--seqlen", "32", "--json"]) == 0
    model = printed(capsys)["model"]
    assert model["stored_as"] == STORED_AS[layout]
    stored = sum((output / name).stat().st_size for name in weights if name.endswith("tensors"))
    assert model["weight_bytes"] == stored


def test_perplexity(
    made: Callable[[str], Path], layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`eval` measures what transformers' own dequantized model gives."""
    source, text = made(layout) / "source", made(layout) / "text.txt"
    shape = ["--nsamples", "4", "--seqlen", "64", "--dtype", "float32", "--json"]
    assert run(["eval", str(source), *OPTIONS, str(text), *shape]) == 0
    measured = printed(capsys)
    ids = byte_tokenizer()(text.read_text()).input_ids
    tokens = torch.tensor(ids[:256]).reshape(4, 64)
    model = dequantized(source, layout).float()
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1].double().flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).item()
    assert measured["predicted_tokens"] == 252
    assert measured["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


@pytest.mark.slow
def test_from_an_object_store(
    made: Callable[[str], Path], s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, and sound against the source in the store."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    folder = made("deepseek_v3 fp8")
    uri = f"{s3.bucket('few-bits')}/model"
    put(folder / "source", ObjectFolder.parse(uri))
    local, remote = tmp_path / "local", tmp_path / "remote"
    assert prune(folder / "source", local, folder / "text.txt") == 0
    assert run(["prune", uri, str(remote), *OPTIONS, str(folder / "text.txt"), *JOB]) == 0
    for path in local.glob("*.safetensors*"):
        assert path.read_bytes() == (remote / path.name).read_bytes()
    assert run(["verify", str(remote), "--source", uri]) == 0


# -- layouts --------------------------------------------------------------------------------------


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


def test_rows_are_decoded_a_few_at_a_time(
    made: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes do not depend on how many: here one block of rows, or one expert."""
    for layout in ("qwen3 fp8", "gpt_oss mxfp4"):
        files = open_model(made(layout) / "source")
        whole = {name: files.read(name) for name in files.tensors}
        monkeypatch.setattr("storage.model.few_bits.MADE_BYTES", 1)
        for name, tensor in whole.items():
            assert torch.equal(files.read(name), tensor), name
        monkeypatch.undo()


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
    expected, files = dequantized(source, "llama compressed fp8").state_dict(), open_model(source)
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
    expected = dequantized(source, "llama compressed fp8").float()
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


# -- refusals -------------------------------------------------------------------------------------


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    write_text(tmp_path / "text.txt")
    return fp8_model(save_tiny_model(tmp_path / "model", dtype=BF16), (16, 16))


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    stored = load_file(folder / "model.safetensors")
    made = change(stored.pop(name))
    save_file(
        stored | ({} if made is None else {name: made.contiguous()}), folder / "model.safetensors"
    )


def nan_code(values: Tensor) -> Tensor:
    raw = values.view(torch.uint8).clone()
    raw[3, 5] = 0x7F
    return raw.view(values.dtype)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (NAME, nan_code, "NaN"),
        (f"{NAME}_scale_inv", lambda scales: scales * math.nan, "NaN"),
        (f"{NAME}_scale_inv", lambda scales: None, "without a weight_scale_inv beside it"),
        (f"{NAME}_scale_inv", lambda scales: scales[:3, :1], "has not the scales of blocks"),
    ],
)
def test_damaged_fp8(
    fp8: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    change: Callable[[Tensor], Tensor | None],
    says: str,
) -> None:
    change_tensor(fp8, name, change)
    text, output = fp8.parent / "text.txt", fp8.parent / "output"
    message = refusal(capsys, ["prune", str(fp8), str(output), *OPTIONS, str(text), *JOB])
    assert says in message
    assert NAME in message
    assert not output.exists()


def test_a_source_that_is_another_now(fp8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether it is by a scale alone: `verify` compares with what the files say now."""
    text, output = fp8.parent / "text.txt", fp8.parent / "output"
    exclude = ["--exclude", ".*up_proj"]
    job = ["prune", str(fp8), str(output), *OPTIONS, str(text), *JOB, *exclude]
    assert run(job) == 0
    before = open_model(fp8).identity()
    change_tensor(fp8, f"{NAME}_scale_inv", lambda scales: scales * 2)
    capsys.readouterr()
    assert run(["verify", str(output), "--source", str(fp8), "--json"]) == 1
    assert printed(capsys)["problems"] == [f"{NAME}: not pruned, but not the source's either"]
    change_config(fp8, quantization_config={"quant_method": "fp8", "weight_block_size": None})
    assert open_model(fp8).identity() != before


def test_a_scale_that_changes_while_a_job_runs(fp8: Path) -> None:
    """What a job has hashed are the dequantized values: another scale is found out, in a read of
    all rows or of some."""
    files = open_model(fp8)
    fingerprint = fingerprint_weight_file(files.source, "model.safetensors")
    assert fingerprint.tensors.keys() == files.tensors.keys()
    files.expected = fingerprint.tensors
    assert torch.equal(files.read(NAME, (3, 9)), files.read(NAME)[3:9])
    change_tensor(fp8, f"{NAME}_scale_inv", lambda scales: scales * 2)
    for rows in (None, (3, 9)):
        with pytest.raises(CorruptFileError, match="not what it was when the job began"):
            files.read(NAME, rows)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "marlin-24"}, "the format 'marlin-24' of compressed-tensors cannot be read"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights in the format"),
        ({"config_groups": {}}, "no group of its quantization_config is that of model.layers.0."),
    ],
)
def test_what_compressed_tensors_has_besides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], says: str
) -> None:
    pytest.importorskip("compressed_tensors")
    source = compressed_fp8_model(save_tiny_model(tmp_path / "model", dtype=BF16))
    said = json.loads((source / "config.json").read_text())["quantization_config"]
    change_config(source, quantization_config=said | changes)
    assert says in refusal(capsys, ["plan", str(source), "--seqlen", "32"])


def test_the_library_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = compressed_fp8_model(save_tiny_model(tmp_path / "model", dtype=BF16))
    monkeypatch.setitem(__import__("sys").modules, "compressed_tensors.compressors", None)
    message = refusal(capsys, ["plan", str(source), "--seqlen", "32"])
    assert "pip install 'prox24[compressed]'" in message
