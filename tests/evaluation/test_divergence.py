"""Distances between models: the formulas, and `prox24 eval` of several models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.command_line import run
from pipeline.statistics.divergence import divergences
from tests.support.jobs import prune_here, write_text
from tests.support.tiny_models import save_tiny_model


def plain(p: torch.Tensor, q: torch.Tensor) -> tuple[float, float]:
    """JS and KL of two distributions (V,) by their definitions, in float64."""
    middle = (p + q) / 2

    def relative_entropy(a: torch.Tensor, b: torch.Tensor) -> float:
        return sum(float(x * math.log(x / y)) for x, y in zip(a, b, strict=True) if x > 0)

    half = (relative_entropy(p, middle) + relative_entropy(q, middle)) / 2
    return half, relative_entropy(p, q)


def test_divergences_are_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    p = 3 * torch.randn(300, 40, generator=generator)
    q = p + torch.randn(300, 40, generator=generator)
    expected = [
        plain(a, b) for a, b in zip(p.double().softmax(1), q.double().softmax(1), strict=True)
    ]
    jensen_shannon, kullback_leibler, same = divergences(p, q)
    assert jensen_shannon == pytest.approx(sum(js for js, _ in expected), rel=1e-5)
    assert kullback_leibler == pytest.approx(sum(kl for _, kl in expected), rel=1e-5)
    assert same == int((p.argmax(1) == q.argmax(1)).sum())


def test_equal_and_disjoint_distributions() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    assert divergences(logits, logits.clone()) == (pytest.approx(0, abs=1e-6), 0, 5)
    left, right = torch.full((1, 4), -torch.inf), torch.full((1, 4), -torch.inf)
    left[0, 0] = right[0, 1] = 0.0
    jensen_shannon, kullback_leibler, same = divergences(left, right)
    assert jensen_shannon == pytest.approx(math.log(2))
    assert kullback_leibler == math.inf
    assert same == 0


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_models_are_held_against_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], architecture: str
) -> None:
    text = write_text(tmp_path / "text.txt")
    dense = save_tiny_model(tmp_path / "dense", architecture)
    prune_here(dense, tmp_path / "pruned", method="magnitude", dataset=str(text))
    options = [
        *("--executor", "local", "--workers", "2", "--threads", "1", "--dataset", str(text)),
        *("--nsamples", "5", "--seqlen", "24", "--batch-size", "2", "--dtype", "float32"),
    ]
    folders = [str(dense), str(tmp_path / "pruned")]
    assert run(["eval", *folders, *options, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["models"]
    against = second["against_first"]
    assert "against_first" not in first
    ratio = math.log(second["perplexity"] / first["perplexity"])
    assert against["loss_difference"] == pytest.approx(ratio, abs=1e-6)
    expected = by_transformers(folders, text)
    for name, value in expected.items():
        assert against[name] == pytest.approx(value, rel=1e-3), name
    assert run(["eval", *folders, *options]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert f"{100 * against['same_token']:.2f} %" in printed


def by_transformers(folders: list[str], text: Path) -> dict[str, float]:
    """The same figures from whole models in memory, and the definitions."""
    from pipeline.text.tokenizer import load_tokenizer
    from tests.support.texts import evaluation_ids

    tokens = evaluation_ids(load_tokenizer(Path(folders[0]), False), str(text), None, 24, 5)
    with torch.no_grad():
        p, q = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens)
            .logits[:, :-1]
            .flatten(0, 1)
            .double()
            .softmax(1)
            for folder in folders
        )
    pairs = [plain(a, b) for a, b in zip(p, q, strict=True)]
    return {
        "jensen_shannon": sum(js for js, _ in pairs) / len(pairs),
        "kullback_leibler": sum(kl for _, kl in pairs) / len(pairs),
        "same_token": float((p.argmax(1) == q.argmax(1)).double().mean()),
    }


def test_other_tokenizers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_text(tmp_path / "text.txt")
    models = [save_tiny_model(tmp_path / name) for name in ("one", "two")]
    path = models[1] / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    options = ["--executor", "local", "--dataset", str(text), "--nsamples", "99", "--seqlen", "16"]
    assert run(["eval", *map(str, models), *options]) == 2
    assert "only models with the same tokenizer" in capsys.readouterr().err
