"""The first four blocks of the real SmolLM2-135M: here quality shows, not only plumbing.

The four blocks alone are a model in whose output nothing makes sense. So they are pruned as a model
of their own, which gives them the same inputs as in the whole one, and then put back in front of
the other 26 blocks, dense, whose perplexity tells what was lost.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.evaluate import EvalConfig
from pipeline.demo_model import demo_texts
from pipeline.evaluation.perplexity import evaluate
from pipeline.runtime.progress import Silent
from pipeline.worker.local_executor import LocalExecutor
from tests.support.jobs import check_output, prune_here, tensors
from tests.support.processes import CONTEXT

BLOCKS = 4
# float32, because bfloat16 products are slow on most CPUs.
COMMON: dict[str, Any] = {"executor": "local", "threads": 1, "dtype": "float32", "batch_size": 4}
CALIBRATION = {"nsamples": 16, "seqlen": 128}
EVALUATION: dict[str, int] = {"nsamples": 2, "seqlen": 256}
METHODS = ("magnitude", "wanda", "sparsegpt", "prox_admm")
LAYERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def block_of(name: str) -> int | None:
    """The block a tensor belongs to."""
    _, inside, rest = name.partition("model.layers.")
    return int(rest.split(".")[0]) if inside else None


def first_blocks(source: Path, folder: Path, blocks: int = BLOCKS) -> Path:
    """A model of the first blocks of another, its ends included; read tensor by tensor."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*", "README.md"))
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] > blocks
    config["num_hidden_layers"] = blocks
    (folder / "config.json").write_text(json.dumps(config))
    kept = {name: t for name, t in tensors(source) if (block_of(name) or 0) < blocks}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def put_back(source: Path, pruned: Path, folder: Path) -> Path:
    """The whole model with the pruned first blocks; weight files without any are linked."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    replaced = dict(tensors(pruned))
    for path in source.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            if any((block_of(name) or 0) < BLOCKS and block_of(name) is not None for name in names):
                weights = {name: replaced.get(name, file.get_tensor(name)) for name in names}
                save_file(weights, folder / path.name, {"format": "pt"})
            else:
                (folder / path.name).hardlink_to(path)
    return folder


def perplexity(model: Path, text: Path, **length: int) -> float:
    config = EvalConfig(dataset=str(text), **COMMON, **(EVALUATION | length))
    return float(evaluate(model, config, lambda: LocalExecutor(1, 1), Silent())["perplexity"])


def measure(source: Path, folder: Path, method: str) -> None:
    """Prunes the four blocks into `folder`/METHOD, and writes the whole model's perplexity."""
    torch.set_num_threads(1)
    options = {**COMMON, **CALIBRATION, "dataset": str(folder / "calibration.txt")}
    del options["executor"]
    pruned = prune_here(folder / "four", folder / method, method=method, **options).output
    whole = put_back(source, pruned, folder / f"{method}-whole")
    (folder / f"{method}.json").write_text(str(perplexity(whole, folder / "evaluation.txt")))
    shutil.rmtree(whole)


@pytest.fixture(scope="module")
def measured(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where `measure` has done every method; the longest in a process of its own."""
    folder = tmp_path_factory.mktemp("real")
    demo_texts(folder)
    first_blocks(smollm2, folder / "four")
    process = CONTEXT.Process(target=measure, args=(smollm2, folder, METHODS[-1]))
    process.start()
    for method in METHODS[:-1]:
        measure(smollm2, folder, method)
    process.join()
    assert process.exitcode == 0
    return folder


def test_the_output_of_every_method(measured: Path) -> None:
    for method in METHODS:
        check_output(measured / "four", measured / method)


def test_perplexity_orders_the_methods(smollm2: Path, measured: Path) -> None:
    found = {m: json.loads((measured / f"{m}.json").read_text()) for m in METHODS}
    found["dense"] = perplexity(smollm2, measured / "evaluation.txt")
    assert found["dense"] < found["prox_admm"] < found["sparsegpt"] < found["magnitude"], found
    assert found["sparsegpt"] < found["wanda"] < found["magnitude"], found
    # Four of thirty blocks: what is lost is a part, not the model.
    assert found["prox_admm"] < 1.5 * found["dense"], found


def test_every_layer_loses_less_with_the_better_method(measured: Path) -> None:
    """In block 0, where both see the same inputs; by each job's own report."""
    errors: dict[str, list[float]] = {}
    for method in ("sparsegpt", "prox_admm"):
        results = json.loads((measured / method / "prox24.json").read_text())["layers"]
        first = {e["layer"]: e["relative_error"] for e in results if e["block"] == 0}
        assert first.keys() == set(LAYERS)
        errors[method] = [first[layer] for layer in LAYERS]
    assert all(0 < error < 60 for method in errors for error in errors[method]), errors
    pairs = list(zip(errors["prox_admm"], errors["sparsegpt"], strict=True))
    assert all(better < other for better, other in pairs), errors


@torch.no_grad()
def by_transformers(model: Path, text: Path, nsamples: int, seqlen: int) -> float:
    """Perplexity by the field's convention, with the whole model in memory, in float32."""
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(), verbose=False).input_ids
    pieces = torch.tensor(ids[: nsamples * seqlen]).reshape(-1, 1, seqlen)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    losses = torch.stack([whole(input_ids=piece, labels=piece).loss for piece in pieces])
    return float(losses.double().mean().exp())


def test_perplexity_is_transformers_own(smollm2: Path, tmp_path: Path) -> None:
    """The whole real model, float32, a few tokens."""
    _, text = demo_texts(tmp_path)
    expected = by_transformers(smollm2, text, **EVALUATION)
    assert perplexity(smollm2, text) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_perplexity_is_transformers_own_at_full_length(smollm2: Path, shared: Path) -> None:
    """The sequences of the field's length, of WikiText-2."""
    text = shared / "data" / "wikitext2-valid.txt"
    length = {"nsamples": 2, "seqlen": 2048}
    expected = by_transformers(smollm2, text, **length)
    assert perplexity(smollm2, text, **length) == pytest.approx(expected, abs=1e-4)
