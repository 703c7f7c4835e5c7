"""Values that are not finite, and layers without input: what the command says, and what it does.

Each case is the command line in a process of its own, with default options.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.runtime.not_finite import first_not_finite
from tests.support.jobs import tensors, write_text
from tests.support.moe_models import save_moe
from tests.support.processes import Driver, prox24
from tests.support.tiny_models import change_weights, largest, save_tiny_model

HALF, BRAIN = torch.float16, torch.bfloat16
ENDS = "is not finite in float16 (which ends at 65504); use --dtype bfloat16 or float32"
B0, B1 = "model.layers.0.", "model.layers.1."
Changes = Mapping[str, Callable[[torch.Tensor], object]]

# The source's dtype, what is done to its weights, options, and the whole message.
OVERFLOWS: dict[str, tuple[torch.dtype, Changes, tuple[str, ...], str]] = {
    "attention, before its product": (
        HALF,
        {f"{B1}self_attn.q_proj.weight": largest(6e4)},
        (),
        f"block 1: the output of {B1}self_attn.q_proj {ENDS}",
    ),
    "attention, after it": (
        HALF,
        {
            f"{B1}self_attn.v_proj.weight": largest(3e3),
            f"{B1}self_attn.o_proj.weight": largest(6e4),
        },
        ("--workers", "2"),
        f"block 1: the output of {B1}self_attn.o_proj {ENDS}",
    ),
    "gate times up": (
        HALF,
        {f"{B1}mlp.gate_proj.weight": largest(600), f"{B1}mlp.up_proj.weight": largest(600)},
        ("--method", "wanda"),
        f"block 1: the input of {B1}mlp.down_proj {ENDS}",
    ),
    # The dense pass ends at its input; it is the pruned pass that sees the output.
    "down_proj": (
        HALF,
        {
            f"{B0}mlp.gate_proj.weight": largest(30),
            f"{B0}mlp.up_proj.weight": largest(30),
            f"{B0}mlp.down_proj.weight": largest(6e4),
        },
        ("--method", "wanda", "--workers", "2"),
        f"block 0: the output of {B0}mlp.down_proj {ENDS}",
    ),
    "embeddings": (
        BRAIN,
        {"model.embed_tokens.weight": largest(1e6)},
        ("--dtype", "float16"),
        f"the embeddings: the weight of model.embed_tokens {ENDS}",
    ),
    "a weight of another dtype": (
        BRAIN,
        {f"{B0}self_attn.v_proj.weight": largest(1e6)},
        ("--dtype", "float16"),
        f"block 0: the weight of {B0}self_attn.v_proj {ENDS}",
    ),
    "more than any dtype": (
        BRAIN,
        {f"{B1}mlp.gate_proj.weight": largest(1e30), f"{B1}mlp.up_proj.weight": largest(1e30)},
        (),
        f"block 1: the input of {B1}mlp.down_proj is not finite in bfloat16; no --dtype reaches "
        "further than bfloat16: check the model's weights, and that it runs in transformers",
    ),
    "the head": (
        HALF,
        {"lm_head.weight": largest(6e4), "model.norm.weight": largest(100)},
        ("--eval-dataset", "text.txt", "--method", "magnitude"),
        f"the loss of sequence 0: the output of lm_head {ENDS}",
    ),
}


def run(folder: Path, model: Path, *options: str, command: str = "prune") -> Driver:
    """The command to its end, on a text of random letters."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    options = tuple(str(text) if option == text.name else option for option in options)
    size = ("--nsamples", "8", "--seqlen", "32", "--threads", "1")
    output = [folder / "out"] if command == "prune" else []
    return prox24(
        [command, model, *output, "--executor", "local", "--dataset", text, *size, *options],
        folder / "log",
    )


def message(driver: Driver) -> str:
    """What `prox24: ` says, in its only line."""
    errors = driver.errors()
    assert "Traceback" not in errors
    (line,) = (line for line in errors.splitlines() if line.startswith("prox24: "))
    assert errors.endswith(f"{line}\n")
    return line.removeprefix("prox24: ")


def model_of(folder: Path, dtype: torch.dtype, changes: Changes) -> Path:
    return change_weights(save_tiny_model(folder / "model", dtype=dtype), changes)


def layers(output: Path) -> dict[str, dict[str, Any]]:
    results = json.loads((output / "prox24.json").read_text())
    return {layer["name"]: layer for layer in results["layers"]}


@pytest.mark.parametrize("case", OVERFLOWS)
def test_the_module_where_a_forward_overflows_is_named(tmp_path: Path, case: str) -> None:
    dtype, changes, options, expected = OVERFLOWS[case]
    driver = run(tmp_path, model_of(tmp_path, dtype, changes), *options)
    assert (message(driver), driver.wait()) == (expected, 1)
    assert not (tmp_path / "out").exists()


def test_the_remedy_of_an_overflow_is_one(tmp_path: Path) -> None:
    dtype, changes, _, _ = OVERFLOWS["gate times up"]
    model = model_of(tmp_path, dtype, changes)
    assert run(tmp_path, model, "--dtype", "bfloat16").wait() == 0
    assert {tensor.dtype for _, tensor in tensors(tmp_path / "out")} == {HALF}


def test_an_expert_is_named(tmp_path: Path) -> None:
    model = save_moe(tmp_path / "model", "qwen3_moe", dtype=HALF)
    expert = f"{B1}mlp.experts.2."
    big = {f"{expert}{name}_proj.weight": largest(3e3) for name in ("gate", "up")}
    driver = run(tmp_path, change_weights(model, big))
    assert message(driver) == f"block 1: the input of {expert}down_proj {ENDS}"


def test_only_hidden_states_are_looked_at_and_hooks_are_taken_off() -> None:
    """A mask may hold infinities. An activation has no name of its own: it may be many layers'."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.act = nn.Identity()

        def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            scores = (self.up(hidden_states) + mask).softmax(dim=-1)
            moved: torch.Tensor = self.down(self.act(scores * self.size))
            return moved

    block, mask = Block(), torch.tensor([0.0, -torch.inf, 0.0, 0.0])
    x = torch.ones(2, 3, 4)
    block.size = 1.0
    run = partial(block, hidden_states=x, mask=mask)
    assert first_not_finite(block, "m.0", run) is None
    block.size = torch.inf
    found = first_not_finite(block, "m.0", run)
    assert found == "the input of m.0.down is not finite in float32"
    block.up.weight.data[0, 0] = torch.nan
    found = first_not_finite(block, "m.0", run)
    assert found == "the weight of m.0.up is not finite in float32"
    for module in block.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_an_evaluation_names_the_block_that_overflows_first(tmp_path: Path) -> None:
    _, changes, _, expected = OVERFLOWS["gate times up"]
    driver = run(tmp_path, model_of(tmp_path, HALF, changes), command="eval")
    assert (message(driver), driver.wait()) == (expected, 1)


def test_a_loss_too_large_for_a_perplexity(tmp_path: Path) -> None:
    """Finite, and so sure of wrong tokens that exp of the mean overflows."""
    sure = {"lm_head.weight": largest(1e5), "model.norm.weight": largest(1e3)}
    driver = run(tmp_path, model_of(tmp_path, torch.float32, sure), command="eval")
    said = message(driver)
    assert driver.wait() == 1
    assert "the mean loss is " in said
    assert " nats a token, too much for a perplexity in float64" in said


def test_debug_shows_where(tmp_path: Path) -> None:
    dtype, changes, _, expected = OVERFLOWS["embeddings"]
    model = model_of(tmp_path, dtype, changes)
    driver = run(tmp_path, model, "--dtype", "float16", "--debug")
    assert driver.wait() == 1
    assert "Traceback (most recent call last)" in driver.errors()
    assert expected in driver.errors()


def test_inputs_too_large_to_be_squared(tmp_path: Path) -> None:
    """They are finite, in float32 even: no dtype helps, leaving the layers dense does."""
    model = model_of(tmp_path, BRAIN, {f"{B0}input_layernorm.weight": largest(1e25)})
    driver = run(tmp_path, model, "--method", "wanda", "--workers", "2")
    said = message(driver)
    for text in (
        f"block 0: the inputs of {B0}self_attn.q_proj (and 2 more layers) reach 2",
        "e+25, and their squares, which are summed, overflow float32",
        f"--override '{B0}self_attn.q_proj=dense'",
        "--method magnitude",
    ):
        assert text in said
    assert driver.wait() == 1
    dense = ("--override", f"{B0}self_attn.[qkv]_proj=dense", "--run-dir", str(tmp_path / "run"))
    assert run(tmp_path, model, "--method", "wanda", *dense).wait() == 0


def test_solved_weights_that_the_stored_dtype_does_not_hold(tmp_path: Path) -> None:
    """They are counted and not clamped; a method that changes no weight is a way out."""
    name = f"{B0}mlp.down_proj"
    small = {f"{B0}mlp.up_proj.weight": largest(1e-3), f"{B0}mlp.gate_proj.weight": largest(0.1)}
    model = model_of(tmp_path, HALF, small | {f"{name}.weight": largest(65000)})
    said = message(driver := run(tmp_path, model))
    assert driver.wait() == 1
    assert said.startswith(f"block 0: layer {name}: ")
    count = int(said.split(" of 2,048 solved weights")[0].rsplit(" ", 1)[1])
    assert 0 < count < 100
    for text in (
        "are beyond float16, in which the layer is stored: the largest is ",
        "float16 ends at 65504",
        "a larger --damping",
        f"--override '{name}=wanda'",
        f"--override '{name}=dense'",
    ):
        assert text in said
    again = run(tmp_path, model, "--override", f"{name}=wanda", "--run-dir", str(tmp_path / "run"))
    assert again.wait() == 0
    assert layers(tmp_path / "out")[name]["method"] == "wanda"


# -- layers without input ------------------------------------------------------------------------


def two_largest(weight: torch.Tensor) -> torch.Tensor:
    """Group by group, the two of four with the largest magnitude; the others are 0."""
    kept = torch.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 4):
            group = list(range(start, start + 4))
            for column in sorted(group, key=lambda c: -abs(float(weight[row, c])))[:2]:
                kept[row, column] = weight[row, column]
    return kept


NO_INPUT = "largest weights kept: its inputs are 0 on all of the calibration text"
MLP = [f"{B1}mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--shrinkage", "auto", "--workers", "2"),
        ("--method", "sparsegpt"),
        ("--method", "wanda", "--refine", "cg", "--workers", "2"),
        ("--method", "prox"),
    ],
)
def test_a_layer_without_input_keeps_its_largest_weights(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    zero = {f"{B1}post_attention_layernorm.weight": torch.zeros_like}
    model = model_of(tmp_path, torch.float32, zero)
    driver = run(tmp_path, model, *options)
    assert driver.wait() == 0
    # On the console, in the results, in the card and in the report.
    lines = [line for line in driver.errors().splitlines() if NO_INPUT in line]
    assert lines == [f"{MLP[0]} and 2 more: {NO_INPUT}"]
    output = tmp_path / "out"
    results = layers(output)
    assert [name for name, each in results.items() if NO_INPUT in each["deviations"]] == MLP
    assert {results[name]["dead_inputs"] for name in MLP} == {32, 64}
    assert {results[name]["objective_zero"] for name in MLP} == {0.0}
    card = (output / "README.md").read_text()
    named = ", ".join(f"`{name}`" for name in MLP)
    assert f"- {NO_INPUT} (3 layers: {named})" in card
    assert "128 of all 512 inputs of these layers, in 3 of them, were 0 on all of the" in card
    page = (tmp_path / "out.run" / "report" / "report.html").read_text()
    assert f"3 layers, the first {MLP[0]}" in page
    assert f"not solved as asked: {NO_INPUT}." in page
    source, pruned = dict(tensors(model)), dict(tensors(output))
    for name in MLP:
        weight = f"{name}.weight"
        assert torch.equal(pruned[weight], two_largest(source[weight]))
    assert prox24(["verify", output, "--source", model], tmp_path / "verify").wait() == 0


def test_inputs_that_are_0_now_and_then_are_counted(tmp_path: Path) -> None:
    """Their columns become 0, as documented; the others are solved as asked."""
    norm = torch.ones(32)
    norm[[3, 4, 5, 6, 7, 20]] = 0
    model = model_of(tmp_path, torch.float32, {f"{B1}input_layernorm.weight": lambda _: norm})
    driver = run(tmp_path, model)
    assert driver.wait() == 0
    assert NO_INPUT not in driver.errors()
    output = tmp_path / "out"
    kinds = [f"self_attn.{name}_proj" for name in "qkv"]
    dead = {name: each["dead_inputs"] for name, each in layers(output).items()}
    assert {name for name, count in dead.items() if count} == {B1 + kind for kind in kinds}
    assert {dead[B1 + kind] for kind in kinds} == {6}
    pruned = dict(tensors(output))
    for kind in kinds:
        columns = pruned[f"{B1}{kind}.weight"].any(dim=0)
        assert torch.equal(columns, norm > 0)
    assert (
        "18 of all 512 inputs of these layers, in 3 of them" in (output / "README.md").read_text()
    )


def test_an_undefined_error_does_not_end_the_job(tmp_path: Path) -> None:
    """Constant inputs, and weights that cancel on them: the dense outputs are 0."""
    columns = torch.tensor([0.03, -0.01, -0.01, -0.01]).repeat(8)
    cancel = {
        "model.embed_tokens.weight": torch.ones_like,
        f"{B0}input_layernorm.weight": torch.ones_like,
        f"{B0}self_attn.q_proj.weight": lambda weight: columns.expand_as(weight),
    }
    model = model_of(tmp_path, torch.float32, cancel)
    assert run(tmp_path, model, "--method", "sparsegpt").wait() == 0
    output, name = tmp_path / "out", f"{B0}self_attn.q_proj"
    entry = layers(output)[name]
    assert (entry["objective_zero"], entry["relative_error"]) == (0.0, None)
    assert entry["objective"] > 0
    assert f"| `{name}` | undefined |" in (output / "README.md").read_text()
    page = (tmp_path / "out.run" / "report" / "report.html").read_text()
    assert f"an undefined share in the worst, {name}" in page
    compared = prox24(["compare", tmp_path / "out.run"], tmp_path / "compare")
    assert compared.wait() == 0
