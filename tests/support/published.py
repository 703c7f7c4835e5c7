"""Model folders as publishers wrote them: a tiny model saved by transformers, its files changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.command_line import run
from pipeline.text.tokenizer import load_tokenizer
from tests.support.jobs import write_text
from tests.support.texts import evaluation_ids
from tests.support.tiny_models import VOCABULARY, byte_tokenizer, random_model

Tensors = dict[str, Tensor]
WEIGHTS = "model.safetensors"
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
EVAL = ("--executor", "local", "--threads", "1", "--nsamples", "7", "--seqlen", "24")


def publish(
    folder: Path, model_type: str, *, dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    """A tiny random model of a class in `folder`, with its tokenizer."""
    config = AutoConfig.for_model(model_type, **(SIZE | options))
    random_model(config).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def change(folder: Path, how: Callable[[Tensors], object]) -> Path:
    """Lets `how` change the tensors of the only weight file, by their stored names."""
    tensors = load_file(folder / WEIGHTS)
    how(tensors)
    save_file(
        {n: t.contiguous().clone() for n, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"}
    )
    return folder


def configure(folder: Path, **changes: Any) -> Path:
    """Changes config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def rename(tensors: Tensors, how: Callable[[str], str]) -> None:
    """Gives every stored tensor another name."""
    renamed = {how(name): tensor for name, tensor in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


@torch.no_grad()
def plain_perplexity(folder: Path, text: Path) -> float:
    """What transformers makes of a folder, on the tokens that `prox24 eval` takes of a text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    seqlen, count = int(EVAL[7]), int(EVAL[5])
    tokens = evaluation_ids(load_tokenizer(folder), str(text), None, seqlen, count)
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
    )
    return math.exp(float(loss))


def eval_perplexity(
    folder: Path, text: Path, capsys: pytest.CaptureFixture[str], batch: int = 3
) -> float:
    """The perplexity that the command line measures."""
    options = [*EVAL, "--dataset", str(text), "--batch-size", str(batch), "--json"]
    capsys.readouterr()
    assert run(["eval", str(folder), *options]) == 0, capsys.readouterr().err
    return float(json.loads(capsys.readouterr().out)["perplexity"])


def pruned(source: Path, output: Path, text: Path, *options: str) -> Path:
    """`source` pruned from the command line."""
    arguments = ["--executor", "local", "--threads", "1", "--dataset", str(text), "--no-report"]
    small = ["--nsamples", "4", "--seqlen", "32", "--batch-size", "2", "--method", "wanda"]
    assert run(["prune", str(source), str(output), *arguments, *small, *options]) == 0
    return output


def refusal(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line with which `prox24 prune` refuses a model."""
    text = write_text(tmp_path / "text.txt")
    capsys.readouterr()
    assert run(["prune", str(source), str(tmp_path / "no"), "--dataset", str(text), *options,
                "--executor", "local", "--nsamples", "4", "--seqlen", "32"]) == 2  # fmt: skip
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("prox24: "), error
    return error[-1]


def as_transformers(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *options: str,
    rel: float = 1e-5,
) -> Path:
    """Evaluates, prunes and verifies a model, compared with transformers; returns the output."""
    text = write_text(tmp_path / "text.txt")
    expected = plain_perplexity(source, text)
    assert eval_perplexity(source, text, capsys) == pytest.approx(expected, rel=rel)
    output = pruned(source, tmp_path / "output", text, *options)
    assert run(["verify", str(output), "--source", str(source)]) == 0, capsys.readouterr().out
    expected = plain_perplexity(output, text)
    assert eval_perplexity(output, text, capsys, batch=1) == pytest.approx(expected, rel=rel)
    return output


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def changed(source: Path, output: Path) -> set[str]:
    """Names of the stored tensors whose bytes differ."""
    found = set()
    for path in source.glob("*.safetensors"):
        before, after = load_file(path), load_file(output / path.name)
        assert before.keys() == after.keys()
        found |= {
            name for name in before if not torch.equal(_bytes(before[name]), _bytes(after[name]))
        }
    return found
