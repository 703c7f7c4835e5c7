"""--reconstruct-norms: which vectors are trained, where they are recorded, and who checks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.models.roles.norms import norm_parameters, trainable_norms
from pipeline.models.skeleton import open_skeleton
from pipeline.output.verify import verify
from storage.files.commit import sha256_file
from tests.support.families import FAMILIES
from tests.support.jobs import prune_here, tensors
from tests.support.tiny_models import byte_tokenizer, random_model, save_tiny_model

OPTIONS: dict[str, Any] = {
    "reconstruct": "block", "reconstruct_epochs": 3, "reconstruct_lr": 1e-3, "nsamples": 48,
    "reconstruct_norms": True,
}  # fmt: skip
# RMS norms that hold their weights less 1, norms of heads, biases, transposed layers.
QUICK = ("gemma2", "gemma3", "opt", "gpt2")
LLAMA_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("norms")
    source = save_tiny_model(folder / "model")
    prune_here(source, folder / "output", **OPTIONS)
    return source, folder / "output"


def changed(source: Path, output: Path) -> set[str]:
    """Names of the vectors that are not the source's."""
    ours = dict(tensors(output))
    return {n for n, t in tensors(source) if t.dim() == 1 and not torch.equal(t, ours[n])}


def test_they_are_trained_listed_and_loaded(made: tuple[Path, Path]) -> None:
    source, output = made
    named = {f"model.layers.{block}.{norm}" for block in range(2) for norm in LLAMA_NORMS}
    assert changed(source, output) == named
    results = json.loads((output / "prox24.json").read_text())
    assert set(results["trained_norms"]) == named
    assert results["reconstruction"]["norms"] == 4
    assert not verify(output, source).problems
    loaded = AutoModelForCausalLM.from_pretrained(output).state_dict()
    for name, tensor in tensors(output):
        assert torch.equal(loaded[name], tensor)
    card = (output / "README.md").read_text()
    assert "every other tensor, but for trained norms, is that of the source" in card
    assert "norms that were trained: 4" in card


def test_without_the_option_they_stay(made: tuple[Path, Path], tmp_path: Path) -> None:
    prune_here(made[0], tmp_path / "out", **(OPTIONS | {"reconstruct_norms": False}))
    assert not changed(made[0], tmp_path / "out")
    results = json.loads((tmp_path / "out" / "prox24.json").read_text())
    assert results["trained_norms"] == []
    assert "norms" not in (tmp_path / "out" / "README.md").read_text().split("## ")[0]


def test_a_norm_that_is_not_listed_must_be_the_sources(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    source, output = made
    path = output / "prox24.json"
    results = json.loads(path.read_text())
    name = results["trained_norms"][0]
    for listed, problem in (
        (results["trained_norms"][1:], f"{name}: not pruned, but not the source's either"),
        (["model.norm.weight", *results["trained_norms"]], "model.norm.weight: trained, but it is"),
    ):
        before = path.read_text()
        path.write_text(json.dumps({**results, "trained_norms": listed}))
        found = verify(output, source).problems
        path.write_text(before)
        assert len(found) == 1
        assert found[0].startswith(problem)


def test_a_listed_norm_must_be_finite(tmp_path: Path, made: tuple[Path, Path]) -> None:
    source, output = made
    file = next(output.glob("*.safetensors"))
    before, results = file.read_bytes(), (output / "prox24.json").read_text()
    harmed = load_file(file)
    name = json.loads(results)["trained_norms"][0]
    harmed[name][0] = torch.nan
    save_file(harmed, file, {"format": "pt"})
    altered = json.loads(results)
    altered["weight_files"][0]["sha256"] = sha256_file(file)
    (output / "prox24.json").write_text(json.dumps(altered))
    found = verify(output, source).problems
    file.write_bytes(before)
    (output / "prox24.json").write_text(results)
    assert f"{name}: holds NaN or Inf" in found


@pytest.mark.parametrize("exchange", [False, True])
def test_workers_and_threads_change_no_byte(
    made: tuple[Path, Path], tmp_path: Path, exchange: bool
) -> None:
    bytes_of = []
    mask = {"reconstruct_mask": "exchange"} if exchange else {}
    for workers, threads in ((1, 1), (2, 1), (3, 2)):
        out = tmp_path / f"out-{workers}"
        prune_here(made[0], out, workers=workers, threads=threads, **OPTIONS, **mask)
        bytes_of.append([p.read_bytes() for p in sorted(out.glob("*.safetensors"))])
    assert bytes_of[0] == bytes_of[1] == bytes_of[2]


def test_a_rate_that_blows_up_keeps_the_sources_norms(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    prune_here(made[0], tmp_path / "out", **(OPTIONS | {"reconstruct_lr": 1e38}))
    assert not changed(made[0], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "prox24.json").read_text())["trained_norms"] == []


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_of_every_family(tmp_path: Path, name: str) -> None:
    family, source = FAMILIES[name], tmp_path / "model"
    random_model(family.config()).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    prune_here(source, tmp_path / "out", method="wanda", **OPTIONS)
    assert not verify(tmp_path / "out", source).problems
    skeleton = open_skeleton(source, dtype=None, trust_remote_code=False)
    results = json.loads((tmp_path / "out" / "prox24.json").read_text())
    blocks = json.loads((tmp_path / "out" / "prox24.json").read_text())["blocks"]
    expected = {
        f"{family.blocks}.{block}.{norm}"
        for block, module in enumerate(skeleton.blocks)
        for norm in norm_parameters(module)
        if blocks[block]["reconstruct"]["kept"] != "solved"
    }
    assert set(results["trained_norms"]) == expected
    named = {skeleton.tensor_name(norm) for norm in expected}
    assert {n for n in changed(source, tmp_path / "out") if "norm" in n or "ln" in n} == named


def test_blocks_that_share_a_norm_leave_it_as_it_is(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"].config())
    model.save_pretrained(tmp_path / "model")
    skeleton = open_skeleton(tmp_path / "model", dtype=None, trust_remote_code=False)
    assert set(trainable_norms(skeleton, 0)) == set(LLAMA_NORMS)
    sources = dict(skeleton.plan.sources)
    sources["model.layers.1.input_layernorm.weight"] = "model.layers.0.input_layernorm.weight"
    object.__setattr__(skeleton.plan, "sources", sources)
    assert set(trainable_norms(skeleton, 0)) == {LLAMA_NORMS[1]}
