"""Whole jobs on models that store all experts of a block in one tensor for each projection."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from pipeline.output.verify import verify
from pipeline.text.tokenizer import load_tokenizer
from tests.support.jobs import (
    SMALL,
    Interrupted,
    StopsAt,
    contents,
    fits,
    header,
    prune_here,
    tensors,
    write_text,
)
from tests.support.moe_models import (
    STACKED,
    expert_matrices,
    load,
    loud,
    made_once,
    moe_config,
    stacked_experts,
)
from tests.support.plain_experts import prune_experts_in_memory
from tests.support.texts import calibration_ids
from tests.support.tiny_models import byte_tokenizer

# Enough text that every expert is above the threshold.
JOB: dict[str, Any] = SMALL | {"nsamples": 16, "method": "sparsegpt"}
STAYS = ("norm", "embed", "lm_head", "router", "bias", "sinks", "vision", "projector")
Made = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(source, output) of a job on a family's tiny model, made once."""
    return made_once(tmp_path_factory.mktemp("stacked"), JOB)


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "prox24.json").read_text())
    return found


@pytest.mark.parametrize("family", STACKED)
def test_stacks_are_pruned_along_each_experts_inputs(made: Made, family: str) -> None:
    source, output = made(family)
    before, after = dict(tensors(source)), dict(tensors(output))
    for name in {path.name for path in source.glob("*.safetensors")}:
        assert header(output / name) == header(source / name)
    stacks = 0
    for name, tensor in after.items():
        if any(part in name for part in STAYS):
            assert torch.equal(tensor, before[name]), name
        elif tensor.dim() == 2:
            assert fits(tensor, 2, 4), name
        else:
            stacks += 1
    experts = stacked_experts(load(output))
    assert stacks == 2 * len(experts) > 0
    for module in experts.values():
        for matrix in expert_matrices(module, together=True).values():
            assert fits(matrix.contiguous(), 2, 4)
            assert (matrix != 0).float().mean() > 0.49
    found = verify(output, source)
    assert found.problems == []
    named = [layer.name for layer in found.layers]
    assert len([name for name in named if name.endswith(".3.gate_up_proj")]) == len(experts)


@pytest.mark.parametrize("family", STACKED)
def test_the_result_is_that_of_a_plain_loop_in_memory(made: Made, family: str) -> None:
    source, output = made(family)
    text = str(source.parent / "text.txt")
    tokens = calibration_ids(load_tokenizer(source), text, None, JOB["nsamples"], JOB["seqlen"], 0)
    expected, counts = prune_experts_in_memory(load(source), tokens, together=True)
    alike = []
    found = load(output)
    for name, parameter in found.named_parameters():
        alike.append(torch.isclose(parameter, expected[name], rtol=1e-3, atol=1e-4).float())
    # A choice between two weights of nearly the same score may fall the other way.
    assert torch.cat([a.flatten() for a in alike]).mean() > 0.999
    said = {layer["name"]: layer["tokens"] for layer in results(output)["layers"]}
    assert counts.items() <= said.items()
    each = load(source).config.to_dict()
    sent = each.get("moe_topk") or each["num_experts_per_tok"]
    assert sum(counts.values()) == 2 * sent * tokens.numel() * len(stacked_experts(found))


# -- single experts ------------------------------------------------------------------------------

EXPERTS_OF = "model.layers.1.mlp.experts"
# Every rule of docs/models.md that names an expert of a stack.
RULES: dict[str, Any] = {
    "exclude": rf"{EXPERTS_OF}\.0\..*",
    "override": f"{EXPERTS_OF}.1.gate_up_proj=wanda,4:8;{EXPERTS_OF}.2.*=dense",
}


@pytest.fixture(scope="module")
def ruled(made: Made) -> tuple[Path, Path, dict[str, Any]]:
    """(source, output, options) of a job by rules, with two workers."""
    source, _ = made("gpt_oss")
    options = SMALL | RULES | {"seqlen": 8, "expert_tokens": 28, "workers": 2}
    options["dataset"] = str(source.parent / "text.txt")
    output = source.parent / "ruled"
    prune_here(source, output, **options)
    return source, output, options


def test_rules_name_single_experts_of_a_stack(ruled: tuple[Path, Path, dict[str, Any]]) -> None:
    source, output, _ = ruled
    before, after = dict(tensors(source)), dict(tensors(output))
    for kind in ("gate_up_proj", "down_proj"):
        ours, theirs = after[f"{EXPERTS_OF}.{kind}"], before[f"{EXPERTS_OF}.{kind}"]
        same = [torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)]
        assert same == [True, False, True, False]
        assert fits(ours[3].T.contiguous(), 2, 4)
    assert fits(after[f"{EXPERTS_OF}.gate_up_proj"][1].T.contiguous(), 4, 8)
    said = results(output)
    dense = {f"{EXPERTS_OF}.{n}.{kind}" for n in (0, 2) for kind in ("gate_up_proj", "down_proj")}
    assert set(said["skipped_because"]) == dense
    layers = {layer["name"]: layer for layer in said["layers"]}
    assert layers[f"{EXPERTS_OF}.1.gate_up_proj"]["method"] == "wanda"
    assert layers[f"{EXPERTS_OF}.1.gate_up_proj"]["pattern"] == "4:8"
    experts = {name: layer for name, layer in layers.items() if ".experts." in name}
    few = said["few_tokens"]
    assert few == {name: layer["tokens"] for name, layer in experts.items() if layer["tokens"] < 28}
    assert 0 < len(few) < len(experts)
    assert verify(output, source).problems == []


def test_a_stack_does_not_depend_on_workers_or_on_a_stop(
    ruled: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    source, whole, options = ruled
    with pytest.raises(Interrupted):
        prune_here(source, tmp_path / "out", executor=StopsAt(2, "write_output", 0), **options)
    again = prune_here(source, tmp_path / "out", **(options | {"workers": 1})).output
    ours, theirs = contents(again), contents(whole)
    different = {name for name in theirs if ours[name] != theirs[name]}
    assert ours.keys() == theirs.keys()
    assert different == set()


@pytest.mark.parametrize("name", ["experts.gate_up_proj", "experts.gate_up_proj_bias"])
def test_verify_looks_at_every_expert_of_a_stack(
    ruled: tuple[Path, Path, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    """One number more in a pruned expert, in one that is dense, and in a bias."""
    source, output, _ = ruled
    damaged = Path(shutil.copytree(output, tmp_path / "damaged"))
    path = next(
        path
        for path in damaged.glob("*.safetensors")
        if f"model.layers.1.mlp.{name}" in load_file(path)
    )
    stored = load_file(path)
    tensor = stored[f"model.layers.1.mlp.{name}"]
    tensor[2].view(-1)[5] += 1
    if tensor.dim() == 3:
        tensor[3, :4, 7] = 1
    save_file(stored, path, {"format": "pt"})
    problems = [problem for problem in verify(damaged, source).problems if "hash" not in problem]
    expected = [f"model.layers.1.mlp.{name}[2]: not pruned, but not the source's either"]
    if tensor.dim() == 3:
        expected.append(f"{EXPERTS_OF}.3.gate_up_proj: does not hold 2:4")
    assert problems == expected


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_calibrating_all_experts_with_all_tokens(made: Made, tmp_path: Path, family: str) -> None:
    source, _ = made(family)
    options = JOB | {"nsamples": 2, "seqlen": 16, "calibrate_all_experts": True}
    options["dataset"] = str(source.parent / "text.txt")
    output = prune_here(source, tmp_path / "out", **options).output
    layers = results(output)["layers"]
    assert {layer["tokens"] for layer in layers} == {32}
    assert {layer["method"] for layer in layers} == {"sparsegpt"}
    assert verify(output, source).problems == []


# -- inside a model for images -------------------------------------------------------------------


@pytest.mark.slow
def test_the_text_stack_of_llama_4_for_images(tmp_path: Path) -> None:
    """Its vision tower is the source's; loaded again it is the plain loop's."""
    text = moe_config("llama4_text").to_dict() | {"pad_token_id": 0}
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vision_output_dim": 16,
        "image_size": 16,
        "patch_size": 8,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    config = AutoConfig.for_model("llama4", text_config=text, vision_config=vision)
    source = tmp_path / "model"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loud(AutoModelForImageTextToText.from_config(config)).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    dataset = str(write_text(tmp_path / "text.txt"))
    output = prune_here(source, tmp_path / "out", dataset=dataset, **JOB).output
    assert verify(output, source).problems == []
    before = dict(tensors(source))
    for name, tensor in tensors(output):
        stays = any(part in name for part in STAYS)
        assert torch.equal(tensor, before[name]) == stays, name
    tokens = calibration_ids(
        load_tokenizer(source), dataset, None, JOB["nsamples"], JOB["seqlen"], 0
    )
    path = "language_model.model.layers"
    model = AutoModelForImageTextToText.from_pretrained(source).eval()
    expected, _ = prune_experts_in_memory(model, tokens, blocks=path, together=True)
    alike = []
    for name, parameter in AutoModelForImageTextToText.from_pretrained(output).named_parameters():
        alike.append(torch.isclose(parameter, expected[name], rtol=1e-3, atol=1e-4).float())
    assert torch.cat([a.flatten() for a in alike]).mean() > 0.999
