"""Which blocks a forward of text calls, and how: what differs from a plain chain is refused, and a
block that text does not reach stays dense."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from cluster.command_line import run
from pipeline.models.forward_capture import ModelEnds
from pipeline.models.skeleton import open_skeleton
from pipeline.models.text_forward import NOT_REACHED, text_forward
from tests.support.jobs import fits, tensors, write_text
from tests.support.multimodal import save_mllama
from tests.support.own_code import BLOCKS, save_own_code
from tests.support.tiny_models import byte_tokenizer, random_model, save_tiny_model

CPU = torch.device("cpu")
SEQLEN = 16
LOCAL = ("--executor", "local", "--threads", "1", "--dtype", "float32", "--seqlen", str(SEQLEN))
# Name of the model -> what its refusal says.
REFUSED = {
    "looped": "calls block 0 more than once",
    "each twice": "calls block 0 more than once",
    "backwards": "calls its blocks in another order: 2, 1",
    "embedding added": "changes the hidden states between blocks 0 and 1",
    "embedding handed": "block 0 of OwnForCausalLM is called with arguments that depend on the tok",
    "skip": "block 2 of OwnForCausalLM is called with more of what other blocks compute",
    "mean of all": "makes its output of more than its last block's",
    "four streams": "hidden states of another form: [4, 2, 3, 32]",
    "shared block": "blocks 0 and 2 of OwnForCausalLM share up.weight",
}


def text(folder: Path) -> Path:
    return write_text(folder / "text.txt", characters=40 * SEQLEN)


def out_of(model: Path) -> Path:
    """Where the pruned model goes: transformers keeps code by the name of its folder."""
    return model.with_name(f"{model.name}_out")


def commands(model: Path, folder: Path, *trust: str) -> list[list[str]]:
    """What plans, prunes and evaluates a model."""
    dataset = ["--dataset", str(text(folder))]
    pruned = ["prune", str(model), str(out_of(model)), *dataset, "--nsamples", "2", *LOCAL]
    pruned += ["--method", "wanda"]
    return [
        ["plan", str(model), "--seqlen", str(SEQLEN), *trust],
        [*pruned, *trust],
        ["eval", str(model), *dataset, *LOCAL, *trust],
    ]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_chain_of_blocks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """In one line, the same for every command, before a run directory is made."""
    model = save_own_code(tmp_path, name)
    said = []
    for command in commands(model, tmp_path, "--trust-remote-code"):
        assert run(command) == 2, command[0]
        said.append(capsys.readouterr().err.strip().splitlines()[-1])
        assert REFUSED[name] in said[-1]
    assert len(set(said)) == 1
    assert not (tmp_path / f"{model.name}_out.run").exists()


@torch.no_grad()
def plain_perplexity(folder: Path, factory: Any = AutoModelForCausalLM, **options: Any) -> float:
    """With the whole model in memory."""
    model = factory.from_pretrained(folder, dtype=torch.float32, **options).eval()
    ids = byte_tokenizer()((folder.parent / "text.txt").read_text()).input_ids
    rows = torch.tensor(ids).reshape(-1, SEQLEN)
    logits = model(input_ids=rows).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    return math.exp(float(loss))


def perplexity(model: Path, capsys: pytest.CaptureFixture[str], *trust: str) -> float:
    capsys.readouterr()
    assert run(["eval", str(model), *commands(model, model.parent)[2][2:], "--json", *trust]) == 0
    return float(json.loads(capsys.readouterr().out)["perplexity"])


@pytest.mark.parametrize(
    ("name", "dense"),
    [("plain", ()), ("positions by name", ()), ("one left out", (1,)), ("last left out", (2,))],
)
def test_a_block_that_is_not_called_stays_dense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, dense: tuple[int, ...]
) -> None:
    model, trust = save_own_code(tmp_path, name), "--trust-remote-code"
    plan, prune, _ = commands(model, tmp_path, trust)
    assert run([*prune, "--no-report"]) == 0
    pruned = dict(tensors(out_of(model)))
    for block in range(BLOCKS):
        for layer in ("up", "down"):
            weight = pruned[f"model.layers.{block}.{layer}.weight"]
            assert fits(weight, 2, 4) == (block not in dense), block
    results = json.loads((out_of(model) / "prox24.json").read_text())
    names = [f"model.layers.{block}.{layer}" for block in dense for layer in ("up", "down")]
    assert results["skipped_because"] == dict.fromkeys(names, NOT_REACHED)
    assert (NOT_REACHED in (out_of(model) / "README.md").read_text()) == bool(dense)
    assert run(["verify", str(out_of(model)), "--source", str(model), trust]) == 0
    for folder in (model, out_of(model)):
        expected = plain_perplexity(folder, trust_remote_code=True)
        assert perplexity(folder, capsys, trust) == pytest.approx(expected, rel=1e-5)
    assert run(plan) == 0
    planned = capsys.readouterr().out
    assert ("a forward of text does not reach" in planned) == bool(dense)


def test_llama_with_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cross attention is not reached by text; the other blocks get their own calls."""
    model = save_mllama(tmp_path / "model")
    _, prune, _ = commands(model, tmp_path)
    assert run(prune) == 0
    results = json.loads((out_of(model) / "prox24.json").read_text())
    because = results["skipped_because"]
    assert set(because.values()) == {NOT_REACHED}
    assert {name.split(".layers.")[1][0] for name in because} == {"1"}
    assert {layer["block"] for layer in results["layers"]} == {0, 2}
    report = (tmp_path / f"{model.name}_out.run" / "report" / "report.html").read_text()
    assert NOT_REACHED in report
    for folder in (model, out_of(model)):
        expected = plain_perplexity(folder, AutoModelForImageTextToText)
        assert perplexity(folder, capsys) == pytest.approx(expected, rel=1e-5)
    assert run(["verify", str(out_of(model)), "--source", str(model)]) == 0
    capsys.readouterr()
    assert run(["plan", str(model), "--seqlen", "16", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["model"]["skipped_because"] == {"block 1": NOT_REACHED}


def test_each_call_belongs_to_its_block(tmp_path: Path) -> None:
    skeleton = open_skeleton(save_mllama(tmp_path / "model"), dtype=None, trust_remote_code=False)
    assert text_forward(skeleton).reached == (0, 2)
    calls = ModelEnds(skeleton, CPU, head=False).calls(torch.zeros((2, 8), dtype=torch.int64))
    assert [call.passed_by for call in calls] == [False, True, False]


def test_four_streams_of_gemma_are_refused_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AutoConfig.for_model(
        "gemma3n_text",
        vocab_size=260,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        head_dim=8,
        laurel_rank=8,
        vocab_size_per_layer_input=260,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 2,
        pad_token_id=258,
    )
    model = tmp_path / "model"
    random_model(config).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    for command in commands(model, tmp_path):
        assert run(command) == 2
        assert "hidden states of another form: [4, 2, 3, 32]" in capsys.readouterr().err


def test_no_method_needs_another_to_have_run(tmp_path: Path) -> None:
    """Blocks of one model return tuples: each method knows it by itself, of one block too."""
    for blocks in (1, 2):
        folder = tmp_path / str(blocks)
        save = {"hidden_size": 32, "num_hidden_layers": blocks, "num_attention_heads": 4}
        config = AutoConfig.for_model("falcon", vocab_size=260, **save)
        random_model(config).save_pretrained(folder)
        tokens = torch.arange(24).reshape(2, 12)
        hidden_states = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
        for head in (False, True):
            skeleton = open_skeleton(folder, dtype=None, trust_remote_code=False)
            ends = ModelEnds(skeleton, CPU, head=head)
            if head:
                assert ends.logits(tokens, hidden_states).shape == (2, 12, 260)
            assert ends.embed(tokens).shape == (2, 12, 32)
        assert text_forward(skeleton).returns == (1,) * blocks


def test_hollow_weights_take_no_memory_and_leave_the_model(tmp_path: Path) -> None:
    skeleton = open_skeleton(save_tiny_model(tmp_path), dtype=None, trust_remote_code=False)
    text_forward(skeleton)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert not any("forward" in vars(block) for block in skeleton.blocks)
