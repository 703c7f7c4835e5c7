"""Whole jobs on blocks with convolutions, state spaces, and routers of any name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.command_line import run
from pipeline.text.tokenizer import load_tokenizer
from tests.support.hybrid_models import HYBRIDS, save_hybrid
from tests.support.jobs import fits, header, tensors, write_text
from tests.support.moe_models import load, stacked_experts
from tests.support.plain_experts import prune_experts_in_memory
from tests.support.texts import calibration_ids, evaluation_ids

SEQUENCES, TOKENS = 16, 32
COMMON = ("--executor", "local", "--threads", "1", "--seqlen", str(TOKENS))
Made = Callable[[str], tuple[Path, Path]]
FAMILIES = [
    pytest.param(name, marks=[] if hybrid.quick else [pytest.mark.slow])
    for name, hybrid in HYBRIDS.items()
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """(source, output) of a job by the command line on a family's tiny model, made once."""
    folder = tmp_path_factory.mktemp("hybrid")
    text = write_text(folder / "text.txt")

    @cache
    def make(family: str) -> tuple[Path, Path]:
        source, output = save_hybrid(folder / family, family), folder / f"{family}-out"
        arguments = ["prune", str(source), str(output), *COMMON, "--dataset", str(text)]
        arguments += ["--method", "sparsegpt", "--nsamples", str(SEQUENCES), "--batch-size", "2"]
        assert run([*arguments, "--no-report"]) == 0
        return source, output

    yield make
    make.cache_clear()


def expected_changes(model: nn.Module, stays: tuple[str, ...]) -> set[str]:
    """The parameters that pruning changes: linear layers of the blocks and stacked experts."""
    found = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and not name.endswith(stays or "!")
    }
    for path, module in stacked_experts(model).items():
        found |= {f"{path}.{name}" for name, p in module.named_parameters() if p.dim() == 3}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_is_pruned_and_all_else_is_as_it_was(
    made: Made, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    source, output = made(family)
    assert run(["verify", str(output), "--source", str(source)]) == 0
    dense, pruned = load(source), dict(load(output).named_parameters())
    changed = expected_changes(dense, HYBRIDS[family].stays)
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, pruned[name]) == (name not in changed), name
        if name in changed:
            # No family here holds its weights transposed.
            assert fits(pruned[name].detach().contiguous(), 2, 4), name
            assert (pruned[name] != 0).float().mean() > 0.49, name
    before, after = dict(tensors(source)), dict(tensors(output))
    assert header(output / "model.safetensors") == header(source / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) or fits(after[name], 2, 4), name
    capsys.readouterr()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_dense_is_listed_with_the_reason(made: Made, family: str) -> None:
    source, output = made(family)
    results = json.loads((output / "prox24.json").read_text())
    dense = results["dense_weights"]
    model, listed = load(source), {layer["name"] for layer in results["layers"]}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            assert (name in listed) != (name in dense), name
        if isinstance(module, nn.Conv1d):
            assert dense[f"{name}.weight"] == "a depthwise convolution: it mixes no channels"
    if dense:
        assert "## Left dense" in (output / "README.md").read_text()


def test_verify_finds_a_router_that_was_pruned(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a prox24 did that took Hunyuan's for a layer to prune."""
    source, output = made("hunyuan_v1_moe")
    copied, name = tmp_path / "copy", "model.layers.0.mlp.gate.wg"
    shutil.copytree(output, copied)
    results = json.loads((copied / "prox24.json").read_text())
    results["layers"].append({**results["layers"][0], "name": name})
    (copied / "prox24.json").write_text(json.dumps(results))
    capsys.readouterr()
    assert run(["verify", str(copied), "--source", str(source)]) != 0
    assert f"{name}: pruned, but it is no layer to prune" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_result_is_that_of_a_plain_loop_in_memory(made: Made, family: str) -> None:
    source, output = made(family)
    hybrid, text = HYBRIDS[family], str(source.parent / "text.txt")
    tokens = calibration_ids(load_tokenizer(source), text, None, SEQUENCES, TOKENS, 0)
    model, found = load(source), load(output)
    dense = model(input_ids=tokens).logits
    expected, _ = prune_experts_in_memory(
        model, tokens, together=hybrid.together, dense=hybrid.stays
    )
    alike = [
        torch.isclose(parameter, expected[name], rtol=1e-3, atol=1e-4).float().flatten()
        for name, parameter in found.named_parameters()
    ]
    # A choice between two weights of nearly the same score may fall the other way.
    assert torch.cat(alike).mean() > 0.999
    logits, plain = found(input_ids=tokens).logits, model(input_ids=tokens).logits
    assert (logits - plain).norm() < 0.05 * (dense - plain).norm()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_its_perplexity_is_that_of_transformers(
    made: Made, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    source, output = made(family)
    text = str(source.parent / "text.txt")
    capsys.readouterr()
    arguments = ["eval", str(source), str(output), *COMMON, "--dataset", text]
    for batch in (1, 3):
        assert run([*arguments, "--nsamples", "7", "--batch-size", str(batch), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)["models"]
        for folder, one in zip((source, output), said, strict=True):
            assert one["perplexity"] == pytest.approx(by_transformers(folder, text), rel=1e-4)


def by_transformers(folder: Path, text: str) -> float:
    """The perplexity of seven sequences, by transformers' own loss."""
    tokens: Any = evaluation_ids(load_tokenizer(folder), text, None, TOKENS, 7)
    model = load(folder)
    losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in tokens]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_kind_of_block_is_planned(
    made: Made, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    source, _ = made(family)
    capsys.readouterr()
    assert run(["plan", str(source), "--seqlen", str(TOKENS), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["model"]["block_kinds"] == HYBRIDS[family].kinds
