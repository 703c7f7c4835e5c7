"""Whole jobs on mixtures of experts: each expert pruned with its own tokens, all else as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.solver import SolverSettings
from pipeline.output.verify import verify
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import Statistics
from pipeline.text.tokenizer import load_tokenizer
from pipeline.worker.solve import solve_group
from tests.support.jobs import (
    SMALL,
    Interrupted,
    StopsAt,
    contents,
    fits,
    prune_here,
    tensors,
    write_text,
)
from tests.support.moe_models import (
    EXPERTS,
    FAMILIES,
    FIRST_DENSE,
    expert_matrices,
    load,
    made_once,
    save_moe,
    stacked_experts,
)
from tests.support.plain_experts import prune_experts_in_memory
from tests.support.texts import calibration_ids

# Enough text that every expert is above the threshold.
JOB: dict[str, Any] = SMALL | {"nsamples": 16, "method": "sparsegpt"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(source, output) of a job on a family's tiny model, made once."""
    return made_once(tmp_path_factory.mktemp("moe"), JOB)


def text(folder: Path) -> str:
    return str(write_text(folder / "text.txt"))


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "prox24.json").read_text())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_pruned_and_all_else_is_as_it_was(
    made: Callable[[str], tuple[Path, Path]], family: str
) -> None:
    source, output = made(family)
    before = dict(tensors(source))
    experts = 0
    for name, tensor in tensors(output):
        stays = ("norm", "embed", "lm_head", ".gate.", "expert_gate", ".bias")
        if any(part in name for part in stays):
            assert torch.equal(tensor, before[name]), name
        else:
            assert fits(tensor, 2, 4), name
            assert (tensor != 0).float().mean() > 0.49, name
            experts += ".experts." in name
    assert experts == 3 * EXPERTS * (2 - (family in FIRST_DENSE))
    assert verify(output, source).problems == []
    for module in stacked_experts(load(output)).values():
        assert all(fits(matrix, 2, 4) for matrix in expert_matrices(module).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_that_of_a_plain_loop_in_memory(
    made: Callable[[str], tuple[Path, Path]], family: str
) -> None:
    source, output = made(family)
    tokens = calibration_ids(
        load_tokenizer(source), text(source.parent), None, JOB["nsamples"], JOB["seqlen"], 0
    )
    expected, counts = prune_experts_in_memory(load(source), tokens)
    found = load(output)
    alike = []
    for name, parameter in found.named_parameters():
        alike.append((torch.isclose(parameter, expected[name], rtol=1e-3, atol=1e-4)).float())
    # A choice between two weights of nearly the same score may fall the other way.
    assert torch.cat([a.flatten() for a in alike]).mean() > 0.999
    said = {layer["name"]: layer["tokens"] for layer in results(output)["layers"]}
    assert counts.items() <= said.items()
    assert sum(counts.values()) == 2 * 3 * tokens.numel() * len(stacked_experts(found))


def test_what_transformers_saves_again_is_the_same(
    made: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Its own conversion back to the files' names and matrices gives the tensors written here."""
    _, output = made("mixtral")
    load(output).save_pretrained(tmp_path)
    again = dict(tensors(tmp_path))
    ours = dict(tensors(output))
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


# -- few tokens, resume, workers ----------------------------------------------------------------


def test_experts_with_few_tokens_are_pruned_by_wanda_and_listed(tmp_path: Path) -> None:
    source = save_moe(tmp_path / "model", "qwen3_moe")
    # 8 tokens choose two of four experts each.
    options = JOB | {"nsamples": 2, "seqlen": 4, "expert_tokens": 5, "method": "prox_admm"}
    result = prune_here(source, tmp_path / "out", dataset=text(tmp_path), **options)
    layers = {layer["name"]: layer for layer in results(result.output)["layers"]}
    few = results(result.output)["few_tokens"]
    experts = {name: layer for name, layer in layers.items() if ".experts." in name}
    assert few == {name: e["tokens"] for name, e in experts.items() if e["tokens"] < 5}
    assert 0 < len(few) < len(experts)
    for name, layer in experts.items():
        assert layer["method"] == ("wanda" if name in few else "prox_admm")
        notes = [note for note in layer["deviations"] if "calibration token" in note]
        assert len(notes) == (name in few)
    assert "Done other than asked" in (result.output / "README.md").read_text()
    assert verify(result.output, source).problems == []


def test_calibrating_all_experts_with_all_tokens(tmp_path: Path) -> None:
    source = save_moe(tmp_path / "model", "qwen3_moe")
    options = JOB | {"nsamples": 2, "seqlen": 8, "calibrate_all_experts": True, "workers": 2}
    result = prune_here(source, tmp_path / "out", dataset=text(tmp_path), **options)
    layers = results(result.output)["layers"]
    assert {layer["tokens"] for layer in layers} == {16}
    assert {layer["method"] for layer in layers if "self_attn" in layer["name"]} == {"sparsegpt"}
    assert verify(result.output, source).problems == []


def test_an_expert_without_a_token_keeps_its_largest_weights() -> None:
    nothing = Statistics(
        columns=8, tokens=0, sequences=0, diagonal=torch.zeros(8), hessian=torch.zeros(8, 8)
    )
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    solved = solve_group({"w": weight}, nothing, SolverSettings().resolved(), None, 1)
    pruned, report = solved["w"]
    magnitude = solver_for(SolverSettings(method="magnitude", refine="none").resolved())
    assert torch.equal(pruned, magnitude.solve(weight, magnitude.prepare(None)).weight)
    assert report["tokens"] == 0
    assert report["deviations"] == ["largest weights kept: no calibration token"]


@pytest.mark.parametrize(
    ("phase", "calls"),
    [("solve", 1), ("advance", 0), pytest.param("write_output", 0, marks=pytest.mark.slow)],
)
def test_an_interrupted_job_ends_with_the_same_bytes(
    tmp_path: Path, whole: Path, phase: str, calls: int
) -> None:
    """Two workers, Hessians in turns, halves compared: all that a block's experts go through."""
    source, output = whole.parent / "model", tmp_path / "out"
    options = RESUMED | {"dataset": text(tmp_path)}
    with pytest.raises(Interrupted):
        prune_here(source, output, executor=StopsAt(2, phase, calls), **options)
    assert not output.exists()
    prune_here(source, output, **options)
    ours, theirs = contents(output), contents(whole)
    assert ours == theirs
    shutil.rmtree(output)


# So few tokens that some experts' inputs are kept, and some spill into matrices.
RESUMED: dict[str, Any] = SMALL | {
    "seqlen": 8,
    "expert_tokens": 1,
    "workers": 2,
    "hessian_memory": 1e-5,
    "shrinkage": "auto",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a job that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    source = save_moe(folder / "model", "olmoe")
    prune_here(source, folder / "out", dataset=text(folder), **RESUMED)
    return folder / "out"


def test_a_job_split_over_workers_is_the_same_but_for_rounding(tmp_path: Path, whole: Path) -> None:
    source = whole.parent / "model"
    alone = prune_here(
        source, tmp_path / "out", dataset=text(tmp_path), **(RESUMED | {"workers": 1})
    ).output
    one, two = dict(tensors(alone)), dict(tensors(whole))
    kept = torch.cat([((one[n] != 0) == (two[n] != 0)).flatten().float() for n in one])
    assert kept.mean() > 0.99
    ours, theirs = results(alone), results(whole)
    for mine, other in zip(ours["layers"], theirs["layers"], strict=True):
        if mine["block"] == 0:
            assert mine["tokens"] == other["tokens"]
            assert mine["objective"] == pytest.approx(other["objective"], rel=1e-2)
