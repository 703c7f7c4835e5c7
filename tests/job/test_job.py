"""Whole jobs on the local executor: what is pruned, and how well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.solver import SolverSettings
from tests.support.jobs import (
    check_output,
    contents,
    fits,
    is_linear_of_a_block,
    prune_here,
    tensors,
)
from tests.support.plain_prune import job_tokens, prune_in_memory
from tests.support.tiny_models import ARCHITECTURES

TinyModel = Callable[..., Path]
# Regularized so that rounding, which another order of sums changes, is not amplified.
STEADY = {"damping": 0.1, "shrinkage": 0.0}
METHODS = ("magnitude", "wanda", "sparsegpt", "prox", "prox_admm")


def plain_prune(source: Path, text: Path, **settings: Any) -> tuple[dict[str, Tensor], list[float]]:
    """The same job by the plainest means, and each layer's relative error in per cent."""
    tokens = job_tokens(source, text)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    names = [n for n, _ in model.named_modules() if is_linear_of_a_block(f"{n}.weight")]
    blocks = [
        [name for name in names if f".layers.{block}." in name]
        for block in range(model.config.num_hidden_layers)
    ]
    errors = prune_in_memory(model, tokens, blocks, SolverSettings(**settings))
    return {f"{name}.weight": model.get_submodule(name).weight for name in names}, errors


def check_equal(output: Path, expected: dict[str, Tensor]) -> None:
    """Masks agree on 99.9 %, and rows of the same mask have the same weights but for rounding."""
    agreeing = total = 0
    for name, tensor in tensors(output):
        if name in expected:
            other = expected.pop(name).detach()
            same = (tensor != 0) == (other != 0)
            agreeing += int(same.sum())
            total += same.numel()
            rows = same.all(dim=1)
            difference = (tensor - other)[rows].float().norm(dim=1)
            assert (difference < 0.01 * other[rows].float().norm(dim=1)).all(), name
    assert not expected
    assert agreeing > 0.999 * total


def check_loads(output: Path) -> None:
    """transformers loads the folder and generates text with it."""
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    prompt = tokenizer("the block", return_tensors="pt", return_token_type_ids=False)
    generated = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.shape == (1, len("the block") + 5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("weight_files", "tied"), [(1, False), (3, True)])
def test_every_family(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, weight_files: int, tied: bool
) -> None:
    source = tiny_model(architecture, weight_files=weight_files, tied=tied)
    result = prune_here(source, tmp_path / "output", damping=0.1, shrinkage="0")
    assert result.output == tmp_path / "output"
    check_output(source, result.output)
    check_loads(result.output)
    expected, _ = plain_prune(source, tmp_path / "text.txt", **STEADY)
    check_equal(result.output, expected)


def reported_errors(output: Path) -> list[float]:
    """The layers' relative errors in per cent, as the job tells them, in model order."""
    return [e["relative_error"] for e in json.loads((output / "prox24.json").read_text())["layers"]]


@pytest.mark.parametrize("method", METHODS)
def test_every_method(tiny_model: TinyModel, tmp_path: Path, method: str) -> None:
    source = tiny_model("llama")
    result = prune_here(source, tmp_path / "output", method=method, damping=0.1, shrinkage="0")
    check_output(source, result.output)
    expected, errors = plain_prune(source, tmp_path / "text.txt", method=method, **STEADY)
    check_equal(result.output, expected)
    # magnitude and wanda keep no Hessian, and quote the error by what they have.
    if method not in ("magnitude", "wanda"):
        assert sorted(reported_errors(result.output)) == pytest.approx(sorted(errors), rel=1e-3)


@pytest.mark.parametrize("method", ["sparsegpt", "prox", "prox_admm"])
def test_the_defaults_of_a_method(tiny_model: TinyModel, tmp_path: Path, method: str) -> None:
    source = tiny_model("llama")
    output = prune_here(source, tmp_path / "output", method=method).output
    _, errors = plain_prune(source, tmp_path / "text.txt", method=method)
    assert sorted(reported_errors(output)) == pytest.approx(sorted(errors), rel=0.05)


@pytest.mark.parametrize("method", ["wanda", "prox_admm"])
def test_bfloat16_weights(tiny_model: TinyModel, tmp_path: Path, method: str) -> None:
    source = tiny_model("llama", dtype=torch.bfloat16)
    output = prune_here(source, tmp_path / "output", method=method, dtype="float32").output
    check_output(source, output)
    check_loads(output)
    assert {t.dtype for _, t in tensors(output)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("pattern", "keep", "group"), [("4:8", 4, 8), ("1:4", 1, 4), ("unstructured:0.5", 32, 64)]
)
@pytest.mark.parametrize("method", ["sparsegpt", "prox_admm"])
def test_other_patterns(
    tiny_model: TinyModel, tmp_path: Path, pattern: str, keep: int, group: int, method: str
) -> None:
    source = tiny_model("llama")
    if pattern.startswith("unstructured"):
        method = "wanda" if method == "prox_admm" else method
    output = prune_here(source, tmp_path / "output", method=method, pattern=pattern).output
    for name, tensor in tensors(output):
        if is_linear_of_a_block(name):
            share = (tensor == 0).float().mean().item()
            assert share == pytest.approx(1 - keep / group, abs=0.02)
            assert pattern.startswith("unstructured") or fits(tensor, keep, group)


def test_refinement_keeps_the_mask_and_lowers_the_error(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama", blocks=1)
    steady: dict[str, Any] = {"method": "wanda", "refine": "cg", "damping": 0.1, "shrinkage": "0"}
    refined = prune_here(source, tmp_path / "refined", **steady).output
    plain = prune_here(source, tmp_path / "plain", method="wanda").output
    text = tmp_path / "text.txt"
    expected, errors = plain_prune(source, text, method="wanda", refine="cg", **STEADY)
    before = dict(tensors(plain))
    for name, tensor in tensors(refined):
        assert torch.equal(tensor != 0, before[name] != 0)
        assert torch.equal(tensor, before[name]) != is_linear_of_a_block(name)
    check_equal(refined, expected)
    for entry in json.loads((refined / "prox24.json").read_text())["layers"]:
        assert entry["objective"] < 0.9 * entry["objective_before"]
    _, unrefined = plain_prune(source, text, method="wanda")
    assert all(low < high for low, high in zip(errors, unrefined, strict=True))


@pytest.mark.parametrize("method", ["wanda", "prox_admm"])
def test_three_workers_do_as_well_as_one(
    tiny_model: TinyModel, tmp_path: Path, method: str
) -> None:
    source = tiny_model("llama", hidden=64, intermediate=128)
    results = [
        prune_here(source, tmp_path / f"output-{n}", method=method, nsamples=12, workers=n)
        for n in (1, 3)
    ]
    one, three = (dict(tensors(result.output)) for result in results)
    names = [name for name in one if is_linear_of_a_block(name)]
    agreeing = sum(int(((one[n] != 0) == (three[n] != 0)).sum()) for n in names)
    assert agreeing >= 0.999 * sum(one[n].numel() for n in names)
    objectives = [
        sum(e["objective"] for e in json.loads((r.output / "prox24.json").read_text())["layers"])
        for r in results
    ]
    assert objectives[1] == pytest.approx(objectives[0], rel=1e-3)


def test_equal_jobs_give_equal_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("llama", weight_files=2)
    outputs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        outputs.append(prune_here(source, tmp_path / name / "model", workers=2).output)
    assert contents(outputs[0]) == contents(outputs[1])
    assert len(contents(outputs[0])) > 5


def test_unsupported_layers_can_be_left_dense(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("llama", intermediate=70)
    output = prune_here(source, tmp_path / "output", skip_unsupported=True).output
    before = dict(tensors(source))
    for name, tensor in tensors(output):
        if is_linear_of_a_block(name) and "down_proj" not in name:
            assert fits(tensor, 2, 4)
        else:
            assert torch.equal(tensor, before[name])
    skipped = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert json.loads((output / "prox24.json").read_text())["skipped_layers"] == skipped


def test_what_the_output_says_of_itself(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("opt")
    (source / "README.md").write_text("---\nlicense: mit\n---\nthe dense model\n")
    result = prune_here(source, tmp_path / "output", damping=0.02)
    card = (result.output / "README.md").read_text()
    results = json.loads((result.output / "prox24.json").read_text())
    for text in ("license: mit", "prox_admm", "2:4", "text.txt", "0.02"):
        assert text in card
    assert "the dense model" not in card
    settings = results["job"]["settings"]
    assert (settings["damping"], settings["nsamples"], settings["seqlen"]) == (0.02, 8, 32)
    assert results["job"]["solver"]["refine"] == "cg"
    names = [entry["name"] for entry in results["layers"]]
    assert sorted(f"{n}.weight" for n in names) == sorted(
        name for name, _ in tensors(source) if is_linear_of_a_block(name)
    )
    for entry in results["layers"]:
        assert 0 < entry["relative_error"] < 100
        assert entry["rows"] == entry["shape"][0]
    summary = result.summary
    assert [block["block"] for block in summary["blocks"]] == [0, 1]
    assert sum(summary["seconds"].values()) == pytest.approx(summary["wall"], rel=0.01)
    assert summary["memory"]["worker_rss_bytes"] > 0
    for block in summary["blocks"]:
        assert 0 < block["memory"]["worker_rss_bytes"] <= summary["memory"]["worker_rss_bytes"]
        assert 0 < block["memory"]["driver_rss_bytes"] <= summary["memory"]["driver_rss_bytes"]
