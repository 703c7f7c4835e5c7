"""The source model's files, fuzzed: prox24's own errors alone, little memory, nothing outside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.skeleton import open_skeleton
from pipeline.text.tokenizer import load_tokenizer
from storage.model.files import ModelFiles, fingerprint_weight_file
from tests.support.hostile import Watch, documents, dump, examples, spoiled
from tests.support.tiny_models import save_tiny_model

INDEX = "model.safetensors.index.json"
FILES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
NAMES = ("outside.safetensors", "../outside.safetensors", FILES[0], FILES[1], "link.safetensors")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two weight files beside a file that it has no business with."""
    folder = tmp_path_factory.mktemp("fuzz-model")
    model = save_tiny_model(folder / "model", blocks=1, hidden=8, intermediate=8, weight_files=2)
    shutil.copy(model / FILES[0], folder / "outside.safetensors")
    (model / "link.safetensors").symlink_to(folder / "outside.safetensors")
    open_skeleton(model, dtype=None, trust_remote_code=False)  # imports the model's code
    load_tokenizer(model)
    return model


def read_all(folder: Path) -> None:
    """Everything that is done with a model's files."""
    files = ModelFiles.open(folder)
    files.identity()
    for name in files.tensors:
        files.read(name)
    for file in files.files:
        files.header_bytes(file)
        fingerprint_weight_file(folder, file)


def with_file(folder: Path, name: str, data: bytes, reader: Callable[[], object]) -> None:
    """Runs a reader while a file of the folder has other contents."""
    path = folder / name
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        Watch(folder).run(reader)
    finally:
        path.write_bytes(before)


def test_the_watch_sees_what_it_should(good: Path, tmp_path: Path) -> None:
    read_all(good)
    watch = Watch(good)
    watch.run(lambda: read_all(good))
    assert str((good / FILES[0]).resolve()) in watch.seen
    with pytest.raises(AssertionError, match="outside"):
        Watch(good).run((good.parent / "outside.safetensors").read_bytes)
    with pytest.raises(MemoryError):
        Watch(good).run(lambda: bytearray(2**33))


@examples(150)
@given(data=st.data())
def test_index_structure(good: Path, data: st.DataObject) -> None:
    document = json.loads((good / INDEX).read_text())
    changed = data.draw(documents(document, NAMES))
    with_file(good, INDEX, dump(changed).encode(), lambda: read_all(good))


@examples(60)
@given(data=st.data())
def test_index_bytes(good: Path, data: st.DataObject) -> None:
    changed = data.draw(spoiled((good / INDEX).read_bytes()))
    with_file(good, INDEX, changed, lambda: read_all(good))


@examples(200)
@given(data=st.data())
def test_header_structure(good: Path, data: st.DataObject) -> None:
    raw = (good / FILES[0]).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    text = dump(data.draw(documents(json.loads(raw[8:end])))).encode()
    changed = len(text).to_bytes(8, "little") + text + raw[end:]
    with_file(good, FILES[0], changed, lambda: read_all(good))


@examples(150)
@given(data=st.data())
def test_header_bytes(good: Path, data: st.DataObject) -> None:
    raw = (good / FILES[0]).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    changed = data.draw(spoiled(raw[:end])) + raw[end:]
    with_file(good, FILES[0], changed, lambda: read_all(good))


CONFIG_EXTRA = (
    {"configuration_files": ["config.4.0.0.json"]},
    ["../../config.4.0.0.json"],
    {"AutoConfig": "evil.Config"},
    "llama", "gpt2", "t5", "bert", "mixtral", "nobody/kernel", "eager", "LlamaForCausalLM",
    "bfloat16", "int8", "float99", {"rope_type": "dynamic"}, {"quant_method": "gptq"},
)  # fmt: skip
CONFIG_KEYS = (
    "auto_map", "configuration_files", "_name_or_path", "attn_implementation",
    "_attn_implementation", "_attn_implementation_internal", "experts_implementation", "dtype",
    "torch_dtype", "text_config", "quantization_config", "rope_scaling", "rope_parameters",
    "layer_types", "sliding_window", "transformers_version", "is_encoder_decoder", "pruned_heads",
    "id2label", "num_labels", "model_type", "architectures", "num_hidden_layers", "vocab_size",
    "hidden_size", "head_dim", "max_position_embeddings", "num_key_value_heads", "hidden_act",
    "pad_token_id", "tie_word_embeddings", "intermediate_size", "initializer_range",
    "base_model_tp_plan", "sub_configs", "attribute_map", "output_attentions", "__class__", "from",
)  # fmt: skip


@examples(200)
@given(data=st.data())
def test_config_structure(good: Path, data: st.DataObject) -> None:
    document = json.loads((good / "config.json").read_text())
    for key in data.draw(st.lists(st.sampled_from(CONFIG_KEYS), max_size=2)):
        document.setdefault(key, 0)
    changed = data.draw(documents(document, CONFIG_EXTRA))
    with_file(good, "config.json", dump(changed).encode(), lambda: opened(good))


@examples(60)
@given(data=st.data())
def test_config_bytes(good: Path, data: st.DataObject) -> None:
    changed = data.draw(spoiled((good / "config.json").read_bytes()))
    with_file(good, "config.json", changed, lambda: opened(good))


def opened(folder: Path) -> None:
    open_skeleton(folder, dtype=None, trust_remote_code=False)
