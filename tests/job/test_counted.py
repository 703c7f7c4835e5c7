"""--calibrate-on responses: every token is run through the blocks, and statistics are of some."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.config.solver import SolverSettings
from pipeline.messages import Outcome
from pipeline.runtime.split import second_half
from pipeline.solvers.types import Statistics
from pipeline.worker.local_executor import LocalExecutor
from storage.run.layer_files import read_layer_file
from tests.support.counted import ON_RESPONSES, cut_all, cut_none, cut_turns, random_ids, turns
from tests.support.jobs import SMALL, contents, prune_here
from tests.support.moe_models import EXPERTS, load, save_moe, stacked_experts
from tests.support.plain_experts import prune_experts_in_memory
from tests.support.plain_prune import inputs_of, prune_in_memory
from tests.support.tiny_models import save_tiny_model

TinyModel = Callable[..., Path]
SHAPE = SMALL["nsamples"], SMALL["seqlen"]
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCK = tuple(f"{'mlp' if n in LAYERS[4:] else 'self_attn'}.{n}" for n in LAYERS)


class Recording(LocalExecutor):
    """Keeps the statistics of each group, over all ranks, as they go into the solvers."""

    def __init__(self, world: int) -> None:
        super().__init__(world, 1)
        self.seen: list[dict[str, tuple[Statistics, ...]]] = []

    def reduce(self) -> list[Outcome[None]]:
        outcomes = super().reduce()
        self.seen.append(dict(self._workers[0].state.statistics))
        return outcomes


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "prox24.json").read_text())
    return found


def weights(folder: Path) -> dict[str, bytes]:
    return {name: raw for name, raw in contents(folder).items() if name.endswith("safetensors")}


def close(hessian: Tensor | None, x: Tensor) -> None:
    """It is the sum of x xᵀ over the inputs `x`, (T, C)."""
    assert hessian is not None
    torch.testing.assert_close(hessian.double(), x.double().T @ x.double(), rtol=1e-4, atol=1e-4)


# -- against a plain loop over the model of transformers ------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda"},
        {"method": "sparsegpt", "refine": "none"},
        {"method": "prox_admm", "shrinkage": "estimate"},
    ],
    ids=lambda options: options["method"],
)
def test_a_dense_model_is_pruned_with_the_tokens_that_count(
    tiny_model: TinyModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    source = tiny_model("llama")
    output = prune_here(source, tmp_path / "out", cut=cut_turns, **ON_RESPONSES, **options).output
    assert isinstance(output, Path)
    counted = turns(*SHAPE)
    names = [[f"model.layers.{block}.{name}" for name in BLOCK] for block in range(2)]
    expected = AutoModelForCausalLM.from_pretrained(source).eval()
    settings = SolverSettings(**options).resolved()
    errors = prune_in_memory(expected, random_ids(*SHAPE), names, settings, counted=counted)
    found = dict(AutoModelForCausalLM.from_pretrained(output).named_parameters())
    alike = [
        torch.isclose(found[name], value, rtol=1e-3, atol=1e-4).flatten()
        for name, value in expected.named_parameters()
    ]
    assert torch.cat(alike).float().mean() > 0.999
    layers = {layer["name"]: layer for layer in results(output)["layers"]}
    if options["method"] != "wanda":  # whose errors are on the diagonal
        said = [layers[name]["relative_error"] for block in names for name in block]
        assert said == pytest.approx(errors, rel=0.02)
    assert {layer["tokens"] for layer in layers.values()} == {int(counted.sum())}
    plain = prune_here(source, tmp_path / "plain", cut=cut_none, **options).output
    assert weights(plain) != weights(output), "the choice of tokens makes a difference"


@torch.no_grad()
def test_halves_and_saved_layers_have_the_sums_over_the_tokens_that_count(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Of both blocks: the second one's inputs come from the first one, pruned."""
    source, executor = tiny_model("llama"), Recording(1)
    options = {"shrinkage": "auto", "save_layers": "*_proj", "nsamples": 24}
    result = prune_here(
        source, tmp_path / "out", cut=cut_turns, executor=executor, **ON_RESPONSES, **options
    )
    ids, counted = random_ids(24, 32), turns(24, 32)
    boundary = second_half(counted.sum(dim=1).tolist())
    assert boundary is not None
    assert boundary != 12, "half of the sequences are not half of the tokens that count"
    assert boundary % SMALL["batch_size"], "a batch has sequences of both halves"
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    pruned = dict(AutoModelForCausalLM.from_pretrained(result.output).named_parameters())
    for block, seen in enumerate(executor.seen):
        prefix = f"model.layers.{block}."
        modules = {name: model.get_submodule(prefix + name) for name in BLOCK}
        inputs = inputs_of(modules, lambda: model(input_ids=ids, use_cache=False))
        for name, halves in seen.items():
            x = inputs[name].float()
            parts = (slice(0, boundary), slice(boundary, None))
            for half, part in zip(halves, parts, strict=True):
                own = x[part][counted[part]]
                assert half.tokens == len(own)
                assert half.sequences == int(counted[part].any(dim=1).sum())
                close(half.hessian, own)
        for name in BLOCK:
            saved = read_layer_file(result.run_directory / "layers" / f"{prefix}{name}.safetensors")
            assert saved.tokens == int(counted.sum())
            assert saved.sequences == int(counted.any(dim=1).sum())
            close(saved.hessian, inputs[name].float()[counted])
            modules[name].weight.copy_(pruned[f"{prefix}{name}.weight"])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_an_expert_is_pruned_with_its_tokens_that_count(tmp_path: Path, family: str) -> None:
    """deepseek_v3 calls a layer of its latent attention with (n, 1, seqlen, C)."""
    source = save_moe(tmp_path / "model", family)
    options = ON_RESPONSES | {"nsamples": 24, "method": "sparsegpt", "expert_tokens": 1}
    output = prune_here(source, tmp_path / "out", cut=cut_turns, **options).output
    assert isinstance(output, Path)
    ids, counted = random_ids(24, SMALL["seqlen"]), turns(24, SMALL["seqlen"])
    expected, counts = prune_experts_in_memory(load(source), ids, counted=counted)
    found = load(output)
    alike = [
        torch.isclose(value, expected[name], rtol=1e-3, atol=1e-4).flatten()
        for name, value in found.named_parameters()
    ]
    assert torch.cat(alike).float().mean() > 0.999
    said = {layer["name"]: layer["tokens"] for layer in results(output)["layers"]}
    assert counts.items() <= said.items()
    mixtures = len(stacked_experts(found))
    assert sum(counts.values()) == 2 * 3 * int(counted.sum()) * mixtures
    others = {tokens for name, tokens in said.items() if name not in counts}
    assert others == {int(counted.sum())}


def test_few_tokens_of_an_expert_are_those_that_count(tmp_path: Path) -> None:
    """Each of the four experts gets about half of the tokens: with all of them it has enough."""
    source = save_moe(tmp_path / "model", "qwen3_moe")
    counted = int(turns(*SHAPE).sum())
    options = {"expert_tokens": counted // 2, "method": "sparsegpt"}
    few = {}
    for name, more in (("all", {}), ("responses", ON_RESPONSES)):
        output = prune_here(source, tmp_path / name, cut=cut_turns, **options, **more).output
        assert isinstance(output, Path)
        layers = {layer["name"]: layer for layer in results(output)["layers"]}
        few[name] = results(output)["few_tokens"]
        for layer in few[name]:
            assert layers[layer]["tokens"] < counted // 2
            assert layers[layer]["method"] == "wanda"
    assert few["all"] == {}
    assert 0 < len(few["responses"]) < 2 * 3 * EXPERTS


def test_with_all_experts_calibrated_each_gets_every_token_that_counts(tmp_path: Path) -> None:
    source, executor = save_moe(tmp_path / "model", "qwen3_moe"), Recording(2)
    options = ON_RESPONSES | {"workers": 2, "calibrate_all_experts": True, "method": "sparsegpt"}
    output = prune_here(
        source, tmp_path / "out", cut=cut_turns, executor=executor, **options
    ).output
    assert isinstance(output, Path)
    ids, counted = random_ids(*SHAPE), turns(*SHAPE)
    assert {layer["tokens"] for layer in results(output)["layers"]} == {int(counted.sum())}
    model = load(source)
    path = "model.layers.0.mlp"
    x = inputs_of({path: model.get_submodule(path)}, lambda: model(input_ids=ids))[path]
    (shared,) = executor.seen[0]["mlp.experts.0.gate_proj"]
    assert shared.sequences == int(counted.any(dim=1).sum())
    close(shared.hessian, x.float()[counted])


# -- the bytes ------------------------------------------------------------------------------------


def test_where_every_token_counts_the_bytes_are_those_without_a_choice(tmp_path: Path) -> None:
    model, mixture = save_tiny_model(tmp_path / "m"), save_moe(tmp_path / "e", "mixtral")
    for number, (source, more) in enumerate(
        [
            (model, {}),
            (model, {"shrinkage": "auto", "nsamples": 7, "workers": 2}),
            (mixture, {"shrinkage": "auto", "nsamples": 7, "workers": 2}),
            (mixture, {"calibrate_all_experts": True}),
        ]
    ):
        first = prune_here(source, tmp_path / f"all-{number}", cut=cut_none, **more)
        second = prune_here(
            source, tmp_path / f"counted-{number}", cut=cut_all, **ON_RESPONSES, **more
        )
        assert weights(first.output) == weights(second.output)


def test_a_choice_that_is_not_asked_for_is_left_out(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("llama")
    first = prune_here(source, tmp_path / "first", cut=cut_none)
    second = prune_here(source, tmp_path / "second", cut=cut_turns)
    assert contents(first.output) == contents(second.output)
    files = [(each.run_directory / "tokens.arrow").read_bytes() for each in (first, second)]
    assert files[0] == files[1]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_statistics_are_the_same_bytes_on_one_worker_and_three(tmp_path: Path, family: str) -> None:
    save = save_tiny_model if family == "llama" else save_moe
    source = save(tmp_path / "model", family)
    seen = []
    for world in (1, 3):
        executor = Recording(world)
        options = ON_RESPONSES | {"shrinkage": "auto", "nsamples": 12, "workers": world}
        prune_here(source, tmp_path / f"{world}", cut=cut_turns, executor=executor, **options)
        seen.append(executor.seen)
    # Of the first block: a solver may give other bytes on other workers.
    one, three = seen[0][0], seen[1][0]
    assert one.keys() == three.keys()
    for name, halves in one.items():
        for own, other in zip(halves, three[name], strict=True):
            assert (own.tokens, own.sequences) == (other.tokens, other.sequences)
            for kind in ("diagonal", "hessian", "inputs"):
                values = getattr(own, kind), getattr(other, kind)
                assert (values[0] is None) == (values[1] is None), (name, kind)
                assert values[0] is None or torch.equal(*values), (name, kind)
