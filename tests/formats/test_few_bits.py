"""Checkpoints in few bits, as they are published: read in place, pruned, written as bfloat16."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
)

from cluster.command_line import run
from storage.object_store import ObjectFolder
from tests.storage.test_object_store import put
from tests.support.few_bits import (
    compressed_fp8_model,
    fp8_model,
    int4_model,
    mxfp4_model,
)
from tests.support.few_bits_jobs import (
    BF16,
    JOB,
    OPTIONS,
    WIDE,
    dequantized,
    plain,
    printed,
    prune,
)
from tests.support.jobs import write_text
from tests.support.moe_models import save_moe
from tests.support.s3_server import S3Server
from tests.support.tiny_models import byte_tokenizer, save_tiny_model

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


# -- as transformers dequantizes ------------------------------------------------------------------


def test_every_byte_is_that_of_transformers(
    made: Callable[[str], Path], layout: str, tmp_path: Path
) -> None:
    source = made(layout) / "source"
    expected = dequantized(source).state_dict()
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
    model = dequantized(source).float()
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
