"""What `from_pretrained` makes of a folder is what prox24 computes with, or it refuses the folder.

Each folder is written as its publisher did, and put through eval, prune and verify from the command
line, beside plain transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.command_line import run
from pipeline.models import load_plan
from storage.model.files import ModelFiles
from tests.support.jobs import write_text
from tests.support.published import (
    EVAL,
    Tensors,
    as_transformers,
    change,
    changed,
    configure,
    pruned,
    publish,
    refusal,
    rename,
)
from tests.support.tiny_models import split_weight_file

Capture = pytest.CaptureFixture[str]
LLAMA = {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEO = {
    "num_layers": 2,
    "num_heads": 4,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]],
}
NEOX = {"intermediate_size": 64, "max_position_embeddings": 64}
LAYERS = 14  # linears of the two blocks of a Llama
MASK = torch.ones(64, 64).tril()[None, None]


def slow(*cases: str) -> list[Any]:
    """Cases that are left out of the quick tests: they take two seconds each."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


# -- what the class computes itself ---------------------------------------------------------------


def old_llama(tensors: Tensors) -> None:
    """Rotary frequencies in every block, here of another base than the config's."""
    other = 1.0 / 500.0 ** (torch.arange(0, 8, 2) / 8)
    for block in range(2):
        tensors[f"model.layers.{block}.self_attn.rotary_emb.inv_freq"] = other
    tensors["model.rotary_emb.inv_freq"] = other
    tensors["model.position_ids"] = torch.arange(128)[None]


def old_gpt2(tensors: Tensors) -> None:
    """Masks beside the weights, and names without the base model's prefix."""
    rename(tensors, lambda name: name.removeprefix("transformer."))
    for block in range(2):
        tensors[f"h.{block}.attn.bias"] = MASK.clone()
        tensors[f"h.{block}.attn.masked_bias"] = torch.tensor(-10000.0)


def old_gpt_neo(tensors: Tensors) -> None:
    """The mask of a local block as floats."""
    for block in range(2):
        tensors[f"transformer.h.{block}.attn.attention.bias"] = MASK.clone()
        tensors[f"transformer.h.{block}.attn.attention.masked_bias"] = torch.tensor(-1e9)


def pythia(tensors: Tensors) -> None:
    """-inf where a mask hides, in float16."""
    for block in range(2):
        prefix = f"gpt_neox.layers.{block}.attention"
        tensors[f"{prefix}.bias"] = MASK.bool()
        tensors[f"{prefix}.masked_bias"] = torch.tensor(float("-inf"), dtype=torch.float16)
        tensors[f"{prefix}.rotary_emb.inv_freq"] = torch.full((1,), 0.1)


RECOMPUTED: dict[str, tuple[str, dict[str, object], Callable[[Tensors], None]]] = {
    "llama": ("llama", LLAMA, old_llama),
    "gpt2": ("gpt2", GPT2, old_gpt2),
    "gpt_neo": ("gpt_neo", NEO, old_gpt_neo),
    "pythia": ("gpt_neox", NEOX | {"dtype": torch.float16}, pythia),
}


@pytest.mark.parametrize("case", [*list(RECOMPUTED)[:2], *slow(*list(RECOMPUTED)[2:])])
def test_what_the_class_computes_itself_is_copied_and_not_loaded(
    tmp_path: Path, capsys: Capture, case: str
) -> None:
    kind, options, how = RECOMPUTED[case]
    source = change(publish(tmp_path / "source", kind, **options), how)  # type: ignore[arg-type]
    # Half precision is rounded in another order where batches have other sizes.
    output = as_transformers(source, tmp_path, capsys, rel=2e-3 if case == "pythia" else 1e-5)
    assert all(name.endswith(".weight") for name in changed(source, output))


# -- embeddings -----------------------------------------------------------------------------------

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def other_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].flip(0)


def equal_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def only_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


TIED: dict[str, Callable[[Tensors], object]] = {
    "another head": other_head,
    "the same head": equal_head,
    "only the head": only_head,
    "only the embedding": lambda tensors: None,
}


@pytest.mark.parametrize("case", [*list(TIED)[:3], *slow("only the embedding")])
def test_embeddings_that_the_config_ties(tmp_path: Path, capsys: Capture, case: str) -> None:
    source = publish(tmp_path / "source", "llama", tie_word_embeddings=True, **LLAMA)
    output = as_transformers(change(source, TIED[case]), tmp_path, capsys)
    assert len(changed(source, output)) == LAYERS


@pytest.mark.parametrize("case", slow("both", "only the head"))
def test_tied_embeddings_by_other_names(tmp_path: Path, capsys: Capture, case: str) -> None:
    """GPT-NeoX stores its head as `embed_out`, its embedding as `embed_in`."""
    source = publish(tmp_path / "source", "gpt_neox", tie_word_embeddings=True, **NEOX)
    embedding, head = "gpt_neox.embed_in.weight", "embed_out.weight"

    def how(tensors: Tensors) -> None:
        tensors[head] = tensors[embedding].flip(0)
        if case != "both":
            del tensors[embedding]

    as_transformers(change(source, how), tmp_path, capsys)


@pytest.mark.slow
def test_a_gpt2_whose_head_is_its_own(tmp_path: Path, capsys: Capture) -> None:
    source = publish(tmp_path / "source", "gpt2", **GPT2)

    def how(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].flip(0)

    as_transformers(change(source, how), tmp_path, capsys)


def test_neither_embedding_is_stored(tmp_path: Path, capsys: Capture) -> None:
    source = publish(tmp_path / "source", "llama", tie_word_embeddings=True, **LLAMA)
    change(source, lambda tensors: tensors.pop(EMBEDDING))
    assert "the weight files lack model.embed_tokens.weight" in refusal(source, tmp_path, capsys)


# -- tensors that no one loads, and files that disagree -------------------------------------------

EXTRA = "model.layers.2.mlp.up_proj.weight"  # of a block that the config does not have


def test_what_is_not_loaded_is_not_checked(tmp_path: Path, capsys: Capture) -> None:
    """A stored layer more, as for prediction of several tokens, in FP8 with NaN and Inf."""

    def how(tensors: Tensors) -> None:
        tensors[EXTRA] = torch.full((64, 32), float("nan"))
        tensors["model.layers.2.scale"] = torch.tensor(float("inf"))
        tensors["model.layers.2.mlp.down_proj.weight"] = torch.ones(4, 3).to(torch.float8_e4m3fn)
        tensors["model.mtp.step"] = torch.tensor(3, dtype=torch.uint16)

    source = change(publish(tmp_path / "source", "llama", **LLAMA), how)
    assert len(changed(source, as_transformers(source, tmp_path, capsys))) == LAYERS


def in_two_files(folder: Path) -> tuple[Path, Path, dict[str, str]]:
    """A model in two weight files, with its index's map, one more tensor in the first."""
    source = change(publish(folder, "llama", **LLAMA), old_llama)
    split_weight_file(source, 2)
    index = source / "model.safetensors.index.json"
    return source, index, json.loads(index.read_text())["weight_map"]


def repeat(source: Path, name: str, file: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / file)
    tensors[name] = torch.full((3,), float("nan"))
    save_file(tensors, source / file, {"format": "pt"})


@pytest.mark.parametrize(
    "case", ["in both", *slow("not in a file", "not in the index", "elsewhere")]
)
def test_files_that_disagree_on_what_no_one_loads(
    tmp_path: Path, capsys: Capture, case: str
) -> None:
    source, index, where = in_two_files(tmp_path / "source")
    files = sorted(set(where.values()))
    name = "model.rotary_emb.inv_freq"
    if case == "not in a file":
        where["model.layers.7.self_attn.rotary_emb.inv_freq"] = files[0]
    elif case == "not in the index":
        del where[name]
    elif case == "elsewhere":
        where[name] = next(file for file in files if file != where[name])
    else:
        repeat(source, name, next(file for file in files if file != where[name]))
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    output = as_transformers(source, tmp_path, capsys)
    assert len(changed(source, output)) == LAYERS


def test_files_that_disagree_on_what_is_loaded(tmp_path: Path, capsys: Capture) -> None:
    source, index, where = in_two_files(tmp_path / "source")
    files, name = sorted(set(where.values())), "model.layers.1.mlp.up_proj.weight"
    del where[name]
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert f"tensor {name} of " in refusal(source, tmp_path, capsys)
    where[name] = files[1]
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    repeat(source, name, files[0])
    assert f"tensor {name} is in " in refusal(source, tmp_path, capsys)


def test_a_head_that_only_the_index_has(tmp_path: Path, capsys: Capture) -> None:
    source = publish(tmp_path / "source", "llama", tie_word_embeddings=True, **LLAMA)
    split_weight_file(source, 2)
    index = source / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    where[HEAD] = where[EMBEDDING]
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    as_transformers(source, tmp_path, capsys)


def test_nan_in_what_is_loaded_is_refused(tmp_path: Path, capsys: Capture) -> None:
    source = publish(tmp_path / "source", "llama", **LLAMA)
    change(source, lambda t: t["model.norm.weight"].fill_(float("nan")))
    assert "model.norm.weight holds NaN or Inf" in refusal(source, tmp_path, capsys)


# -- the class in config.json ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", *slow("gpt2")])
def test_a_base_class_with_its_own_names(tmp_path: Path, capsys: Capture, kind: str) -> None:
    """Saved without a head, which is the embedding."""
    options = GPT2 if kind == "gpt2" else LLAMA | {"head_dim": 8, "tie_word_embeddings": True}
    source = publish(tmp_path / "source", kind, **options)
    base, prefix = {"qwen3": ("Qwen3Model", "model."), "gpt2": ("GPT2Model", "transformer.")}[kind]
    change(source, lambda tensors: rename(tensors, lambda name: name.removeprefix(prefix)))
    as_transformers(configure(source, architectures=[base]), tmp_path, capsys)


def test_an_early_bloom(tmp_path: Path, capsys: Capture) -> None:
    source = publish(tmp_path / "source", "bloom", n_layer=2, n_head=4)
    change(source, lambda tensors: rename(tensors, lambda n: n.removeprefix("transformer.")))
    configure(source, architectures=["BloomModel"])
    assert len(changed(source, as_transformers(source, tmp_path, capsys))) == 8


def test_a_base_class_without_its_head(tmp_path: Path, capsys: Capture) -> None:
    source = publish(tmp_path / "source", "qwen3", head_dim=8, **LLAMA)
    change(source, lambda tensors: tensors.pop(HEAD))
    configure(source, architectures=["Qwen3Model"])
    assert "the weight files lack lm_head.weight" in refusal(source, tmp_path, capsys)


@pytest.mark.parametrize(
    ("kind", "architecture", "options"),
    [
        ("bert", "BertLMHeadModel", {}),
        ("roberta", "RobertaForCausalLM", {"is_decoder": False, "pad_token_id": 1}),
        ("megatron-bert", "MegatronBertForCausalLM", {}),
        ("gemma3_text", "Gemma3TextModel", {"use_bidirectional_attention": True, "head_dim": 8}),
    ],
)
def test_encoders_are_refused(
    tmp_path: Path, capsys: Capture, kind: str, architecture: str, options: dict[str, object]
) -> None:
    source = publish(tmp_path / "source", kind, **(LLAMA | options))
    configure(source, architectures=[architecture])
    assert "each token sees those after it" in refusal(source, tmp_path, capsys)


# -- files that belong together -------------------------------------------------------------------

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "r": 8}


def test_a_left_over_adapter_does_not_reach_the_output(tmp_path: Path, capsys: Capture) -> None:
    source = publish(tmp_path / "source", "llama", **LLAMA)
    (source / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (source / "adapter_model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    text = write_text(tmp_path / "text.txt")
    output = pruned(source, tmp_path / "output", text)
    note = "the adapter beside the model (adapter_config.json) is left out"
    assert note in " ".join(capsys.readouterr().err.split())
    options = [*EVAL, "--dataset", str(text)]
    assert run(["eval", str(source), *options]) == 0
    assert note in " ".join(capsys.readouterr().err.split())
    assert not list(output.glob("adapter*"))
    assert run(["verify", str(output), "--source", str(source)]) == 0
    (output / "adapter_config.json").write_text("{}")
    assert run(["verify", str(output), "--source", str(source)]) != 0


@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_alone_is_refused(tmp_path: Path, capsys: Capture, config: bool) -> None:
    source = publish(tmp_path / "source", "llama", **LLAMA)
    (source / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (source / "model.safetensors").rename(source / "adapter_model.safetensors")
    if not config:
        (source / "config.json").unlink()
    found = refusal(source, tmp_path, capsys)
    assert "holds an adapter" in found
    assert "merge_and_unload" in found


# -- two stored embeddings ------------------------------------------------------------------------


def test_two_tensors_are_compared_some_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish(tmp_path / "source", "llama", tie_word_embeddings=True, **LLAMA)
    change(source, equal_head)
    monkeypatch.setattr(load_plan, "_ROWS_BYTES", 1000)
    files = ModelFiles.open(source)
    read, rows = files.read, []

    def counted(name: str, rows_: tuple[int, int] | None = None, **more: Any) -> torch.Tensor:
        rows.append(more.get("rows", rows_))
        return read(name, **more)

    monkeypatch.setattr(files, "read", counted)
    assert load_plan.same_values(files, HEAD, EMBEDDING, torch.float32)
    assert len(rows) == 2 * -(-260 // 7)
    assert rows[-1] == (259, 260)
    # Once, until someone writes to the file.
    assert load_plan.same_values(files, HEAD, EMBEDDING, torch.float32)
    assert len(rows) == 2 * -(-260 // 7)
    change(source, lambda tensors: tensors[HEAD][259, 31].add_(1))
    assert not load_plan.same_values(files, HEAD, EMBEDDING, torch.float32)
