"""What a user is told where a model cannot be used as it is, and how long its input may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PretrainedConfig

from cluster.command_line import run
from pipeline.evaluation.likelihood import longest_sequence
from pipeline.models.from_config import longest_input, reason
from pipeline.models.skeleton import check_seqlen, open_skeleton
from pipeline.text import tokenizer as tokenizers
from pipeline.text.tokenizer import load_tokenizer
from storage.errors import ConfigError, ModelError
from tests.support.families import FAMILIES
from tests.support.jobs import write_text
from tests.support.own_code import save_own_code
from tests.support.tiny_models import random_model, save_tiny_model

LOCAL = ("--executor", "local", "--seqlen", "16")
# Options of a config -> the longest input that it allows.
LONGEST: dict[str, tuple[dict[str, Any], int | None]] = {
    "llama": ({"max_position_embeddings": 77}, 77),
    "gpt2": ({"n_positions": 77}, 77),
    "gptj": ({"n_positions": 77}, 77),
    "ctrl": ({"n_positions": 77}, 77),
    "mpt": ({"max_seq_len": 77}, 77),
    "dbrx": ({"max_seq_len": 77}, 77),
    "kimi_linear": ({"model_max_length": 77}, 77),
    "rwkv": ({"context_length": 77}, 77),
    "whisper": ({"max_target_positions": 77}, 77),
    # Attention biases in place of positions: a length in config.json is of the training.
    "bloom": ({"seq_length": 77}, None),
    "mamba": ({}, None),
    "xlnet": ({}, None),
}


@pytest.mark.parametrize("model_type", LONGEST)
def test_the_longest_input_of_a_config(model_type: str) -> None:
    options, expected = LONGEST[model_type]
    assert longest_input(AutoConfig.for_model(model_type, **options)) == expected


@pytest.mark.parametrize("name", ["n_ctx", "seq_length", "max_sequence_length", "max_seq_length"])
def test_a_config_with_its_own_code_has_a_longest_input(name: str) -> None:
    """Its class takes the length as a keyword, as models' own code does."""
    source = (
        f"def __init__(self, {name}=33, **rest): Base.__init__(self, **rest); self.{name}={name}"
    )
    scope: dict[str, Any] = {"Base": PretrainedConfig}
    exec(source, scope)
    kind = type("Own", (PretrainedConfig,), {"__init__": scope["__init__"]})
    assert longest_input(kind()) == 33
    assert longest_input(kind(**{name: 44})) == 44


def test_mpt_is_not_run_on_more_than_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    random_model(FAMILIES["mpt"].config()).save_pretrained(model)
    skeleton = open_skeleton(model, dtype=None, trust_remote_code=False)
    assert longest_sequence(skeleton) == 128
    check_seqlen(skeleton, 128)
    with pytest.raises(ConfigError, match="--seqlen 129 is above the model's maximum of 128"):
        check_seqlen(skeleton, 129)
    data = ("--dataset", str(write_text(tmp_path / "text.txt")))
    assert run(["eval", str(model), *data, "--seqlen", "129", "--executor", "local"]) == 2
    assert "above the model's maximum of 128" in capsys.readouterr().err


def test_own_code_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_own_code(tmp_path)
    data = ("--dataset", str(write_text(tmp_path / "text.txt")))
    for command in (
        ["plan", str(model)],
        ["plan", str(model / "config.json")],
        ["eval", str(model), *data, *LOCAL],
        ["prune", str(model), str(tmp_path / "out"), *data, *LOCAL],
    ):
        assert run(command) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "comes with its own code" in said
        assert "--trust-remote-code" in said


def test_a_tokenizers_own_code_is_asked_for(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path)
    path = model / "tokenizer_config.json"
    said = json.loads(path.read_text())
    said |= {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(said))
    with pytest.raises(ModelError, match="tokenizer .* its own code .* --trust-remote-code"):
        load_tokenizer(model)


def test_what_a_long_reason_ends_with_is_kept() -> None:
    error = ValueError(f"no model {'x' * 1000} and so: pip install flash-attn")
    assert reason(error).endswith("pip install flash-attn")
    assert reason(error).startswith("no model x")
    assert len(reason(error)) == 300


def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path: Path) -> None:
    """As Llama 2 and Gemma were first published: tokenizer.model, without tokenizer.json."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    text = tmp_path / "text"
    text.write_text("\n".join(f"the quick brown fox {n} jumps" for n in range(200)))
    trainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    config = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer: Any = load_tokenizer(tmp_path)
    ids = tokenizer("the quick fox").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "the quick fox"


def test_a_package_that_a_tokenizer_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model(tmp_path, tokenizer=False)
    (model / "tokenizer.model").write_bytes(b"no sentencepiece model")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr(tokenizers, "is_installed", lambda module: module != "sentencepiece")
    with pytest.raises(ModelError, match="sentencepiece model: pip install sentencepiece$"):
        load_tokenizer(model)
    monkeypatch.setattr(tokenizers, "is_installed", lambda module: True)
    with pytest.raises(ModelError, match="does not load .*pip install tiktoken, or copy"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("files", "tensor", "said"),
    [
        (("quantize_config.json",), "mlp.up_proj.qweight", "quantized by AutoGPTQ"),
        (("quant_config.json",), "mlp.up_proj.qweight", "quantized by AWQ"),
        ((), "mlp.up_proj.qweight", "quantized by GPTQ or AWQ"),
        ((), "mlp.up_proj.SCB", "quantized by bitsandbytes"),
        ((), "mlp.up_proj.weight.absmax", "quantized by bitsandbytes"),
    ],
)
def test_weights_that_old_tools_packed_are_called_so(
    tmp_path: Path, files: tuple[str, ...], tensor: str, said: str
) -> None:
    """Their config.json says nothing of it, and the class's own weights are not there."""
    model = save_tiny_model(tmp_path)
    stored = load_file(model / "model.safetensors")
    stored.pop("model.layers.0.mlp.up_proj.weight")
    stored[f"model.layers.0.{tensor}"] = torch.zeros(8, 8, dtype=torch.int32)
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    for file in files:
        (model / file).write_text('{"bits": 4, "group_size": 128}')
    with pytest.raises(ModelError, match=said):
        open_skeleton(model, dtype=None, trust_remote_code=False)


@pytest.mark.parametrize(
    ("file", "weights", "said"),
    [
        ("quantize_config.json", "gptq_model-4bit-128g.safetensors", "AutoGPTQ"),
        ("quant_config.json", "awq_model_w4_g128.pt", "AWQ"),
        ("quant_config.json", "pytorch_model.bin", "AWQ"),
    ],
)
def test_folders_of_old_quantizers_are_called_so(
    tmp_path: Path, file: str, weights: str, said: str
) -> None:
    """Weights of names that prox24 does not read; converting them would be no way out."""
    model = save_tiny_model(tmp_path)
    (model / "model.safetensors").rename(model / weights)
    (model / file).write_text('{"bits": 4, "group_size": 128}')
    with pytest.raises(ModelError, match=f"quantized by {said}.*was not quantized"):
        open_skeleton(model, dtype=None, trust_remote_code=False)
