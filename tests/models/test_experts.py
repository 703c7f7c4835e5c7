"""Mixtures of experts taken apart: names, outputs and statistics of single experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.prune import PruneConfig
from pipeline.config.solver import SolverSettings
from pipeline.models.experts import Experts, expert_of, send_every_token, unstack_experts
from pipeline.models.forward_capture import BlockCall, ModelEnds, find_groups
from pipeline.models.linears import linear_layers, unsupported_parameters
from pipeline.models.selection import select_layers
from pipeline.models.skeleton import open_skeleton
from pipeline.output.few_tokens import few_tokens
from pipeline.output.keep_mask import KeepMask, masks_of
from pipeline.runtime.stopwatch import Stopwatch
from pipeline.solvers.types import Statistics
from pipeline.statistics.accumulate import GroupAccumulator
from pipeline.statistics.observer import BlockObserver
from pipeline.worker.few_tokens import fallback
from pipeline.worker.solve import in_parts, solve_group
from storage.errors import ModelError
from tests.support.moe_models import (
    EXPERTS,
    FAMILIES,
    FIRST_DENSE,
    HIDDEN,
    expert_matrices,
    load,
    moe_config,
    save_moe,
    stacked_experts,
    token_ids,
)
from tests.support.tiny_models import VOCABULARY

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("experts")
    return {family: save_moe(folder / family, family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_blocks_compute_what_the_whole_model_does(models: dict[str, Path], family: str) -> None:
    """Block by block from the weight files, against transformers' own load and forward."""
    skeleton = open_skeleton(models[family], dtype=None, trust_remote_code=False)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    ends = ModelEnds(skeleton, CPU, head=True)
    ids = token_ids()
    hidden = ends.embed(ids)
    for number, call in enumerate(ends.calls(ids)):
        hidden = call.run(skeleton.load_block(number, CPU), hidden)
    expected = load(models[family])(input_ids=ids, use_cache=False).logits
    assert torch.allclose(ends.logits(ids, hidden), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_matrix_is_one_tensor_of_the_files(
    models: dict[str, Path], family: str
) -> None:
    skeleton = open_skeleton(models[family], dtype=None, trust_remote_code=False)
    stored = load_file(models[family] / "model.safetensors")
    whole = load(models[family])
    found = set()
    for path, module in stacked_experts(whole).items():
        for name, matrix in expert_matrices(module).items():
            tensor = skeleton.tensor_name(f"{path}.{name}.weight")
            assert tensor is not None
            assert torch.equal(stored[tensor], matrix)
            found.add(tensor)
    blocks = 2 - (family in FIRST_DENSE)
    assert len(found) == 3 * EXPERTS * blocks
    # Every other tensor of the files has its parameter as well.
    named = {skeleton.tensor_name(name) for name in skeleton.model.state_dict()}
    assert named == set(stored)


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_are_no_layers(models: dict[str, Path], family: str) -> None:
    skeleton = open_skeleton(models[family], dtype=None, trust_remote_code=False)
    layers = linear_layers(skeleton.blocks[1])
    assert "mlp.experts.3.down_proj" in layers
    assert ("mlp.shared_expert.up_proj" in layers) == (family == "qwen2_moe")
    assert not [name for name in layers if name.endswith("gate")]
    assert select_layers(skeleton, PruneConfig().layer_rules()).skipped == {}


def test_a_router_may_be_a_module_around_others(tmp_path: Path) -> None:
    """Afmoe's has no weight of its own, but a linear layer inside: that stays dense too."""
    config = AutoConfig.for_model(
        "afmoe",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_dense_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    skeleton = open_skeleton(tmp_path, dtype=None, trust_remote_code=False)
    assert unsupported_parameters(skeleton.blocks[1]) == []
    layers = linear_layers(skeleton.blocks[1])
    assert "mlp.experts.3.gate_proj" in layers
    assert not any("router" in name for name in layers)


def test_a_missing_expert_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_moe(tmp_path / "model", "mixtral")
    stored = load_file(folder / "model.safetensors")
    lost = next(name for name in stored if ".1." in name and name.endswith("experts.2.w3.weight"))
    del stored[lost]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.gate_up_proj.*hold 7 of them"):
        open_skeleton(folder, dtype=None, trust_remote_code=False)


def test_what_the_class_keeps_in_float32_stays_in_float32(tmp_path: Path) -> None:
    """A correction of routers' scores, which decides which experts a token is sent to."""
    folder = save_moe(tmp_path / "model", "deepseek_v3")
    skeleton = open_skeleton(folder, dtype="bfloat16", trust_remote_code=False)
    block = skeleton.load_block(1, CPU)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, tensor in expected.model.layers[1].mlp.gate.state_dict().items():
        found = block.mlp.gate.state_dict()[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert block.mlp.gate.e_score_correction_bias.dtype == torch.float32


def test_experts_that_are_a_list_of_modules_are_refused(models: dict[str, Path]) -> None:
    """As before transformers 5, or in a model's own code: not all are called in a forward."""
    skeleton = open_skeleton(models["olmoe"], dtype=None, trust_remote_code=False)
    mixture = skeleton.blocks[1].mlp
    mixture.experts = nn.ModuleList(mixture.experts)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts is a list of modules.*Olmoe"):
        select_layers(skeleton, PruneConfig().layer_rules())


@torch.no_grad()
def test_stacked_experts_keep_their_zeros_in_training(models: dict[str, Path]) -> None:
    model = load(models["mixtral"])
    assert not masks_of(model)
    for module in stacked_experts(model).values():
        module.down_proj[..., ::2] = 0
    assert {mask.shape for mask in masks_of(model).values()} == {(EXPERTS, HIDDEN, 16)}
    keep = KeepMask(model)
    for parameter in model.parameters():
        parameter.add_(1)
    keep.on_optimizer_step(None, None, None)
    for module in stacked_experts(model).values():
        assert not module.down_proj[..., ::2].any()
        assert bool(module.down_proj[..., 1::2].all())
        assert bool(module.gate_up_proj.all())


# -- one block's statistics ---------------------------------------------------------------------


def block_of_experts() -> tuple[torch.nn.Module, BlockCall]:
    """The mixture alone as a block: it is called with hidden states and nothing else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(moe_config("mixtral")).eval()
        mixture = model.model.layers[0].mlp
        unstack_experts(mixture)
        with torch.no_grad():
            for parameter in mixture.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return mixture, BlockCall((), {})


def observed(
    boundary: int | None, sequences: Tensor, batch: int = 2, *, every_token: bool = False
) -> dict[str, tuple[Statistics, ...]]:
    block, call = block_of_experts()
    if every_token:
        send_every_token(block)
    groups = find_groups(block, call, sequences[:batch], tuple(linear_layers(block)))
    sums = {g: GroupAccumulator(g.columns, "full", CPU, boundary) for g in groups}
    observer = BlockObserver(block, sums, lambda _: call, Stopwatch(CPU))
    with torch.no_grad():
        for start in range(0, len(sequences), batch):
            observer.add(start, sequences[start : start + batch])
    return {name: tuple(s.statistics() for s in own) for name, own in observer.sums().items()}


def random_states(count: int, seqlen: int = 8) -> Tensor:
    return torch.randn(count, seqlen, HIDDEN, generator=torch.Generator().manual_seed(3))


def test_an_expert_is_observed_on_its_own_tokens() -> None:
    sequences = random_states(4)
    block, _ = block_of_experts()
    _, _, chosen = block.gate(sequences)
    rows = sequences.reshape(-1, HIDDEN)
    found = observed(None, sequences)
    assert len(found) == 2 * EXPERTS
    for number in range(EXPERTS):
        own = rows[(chosen == number).any(dim=1)]
        (total,) = found[f"experts.{number}.gate_proj"]
        assert total.tokens == len(own) == found[f"experts.{number}.down_proj"][0].tokens
        assert 0 < total.tokens < len(rows)
        assert torch.allclose(total.hessian, own.T @ own, rtol=1e-4, atol=1e-4)


def test_halves_are_by_the_sequence_a_token_is_of() -> None:
    sequences = random_states(6)
    first, second = observed(None, sequences[:3], 1), observed(None, sequences[3:], 1)
    for name, halves in observed(3, sequences).items():
        for half, alone in zip(halves, (first[name][0], second[name][0]), strict=True):
            assert (half.tokens, half.sequences) == (alone.tokens, alone.sequences)
            assert torch.allclose(half.hessian, alone.hessian, rtol=1e-4, atol=1e-4)


def test_experts_without_a_token_are_groups_of_their_own() -> None:
    """Tensors without rows all have the same address."""
    sequences = random_states(1, seqlen=1)
    found = observed(None, sequences, 1)
    counts = {name: halves[0].tokens for name, halves in found.items()}
    assert sum(counts.values()) == 2 * 2
    assert sorted(counts.values()) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_with_every_token_all_experts_share_their_input_and_outputs_stay() -> None:
    sequences = random_states(3)
    block, call = block_of_experts()
    with torch.no_grad():
        routed = call.run(block, sequences)
    rows = sequences.reshape(-1, HIDDEN)
    found = observed(None, sequences, 3, every_token=True)
    assert len(found) == 1 + EXPERTS
    (shared,) = found["experts.0.gate_proj"]
    assert (shared.tokens, shared.sequences) == (24, 3)
    assert torch.allclose(shared.hessian, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert {halves[0].tokens for halves in found.values()} == {24}
    send_every_token(block)
    with torch.no_grad():
        assert torch.allclose(call.run(block, sequences), routed, rtol=1e-4, atol=1e-4)


def test_many_rows_of_one_input_are_solved_in_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {f"{n}": torch.randn(48, 8, generator=generator) for n in range(5)}
    assert [list(part) for part in in_parts(weights)] == [["0", "1"], ["2", "3"], ["4"]]
    assert [list(part) for part in in_parts({"0": torch.zeros(1000, 8)})] == [["0"]]
    settings = SolverSettings().resolved()
    together = solve_group(weights, statistics(40), settings, None)
    for name, weight in weights.items():
        alone = solve_group({name: weight}, statistics(40), settings, None)
        assert torch.equal(alone[name][0], together[name][0])
        counts = [solved[name][1].pop("mask") for solved in (alone, together)]
        assert torch.equal(*(own.pop("by_column") for own in counts))
        assert counts[0] == counts[1]
        assert alone[name][1] == together[name][1]


def test_the_expert_of_a_layer() -> None:
    block, _ = block_of_experts()
    assert expert_of(block, "experts.2.up_proj") is block.get_submodule("experts.2")
    assert expert_of(block, "gate") is None
    assert isinstance(block.experts, Experts)


# -- few tokens ---------------------------------------------------------------------------------


def statistics(count: int) -> Statistics:
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    return Statistics(columns=8, tokens=count, sequences=min(count, 1), inputs=inputs)


@pytest.mark.parametrize(
    ("method", "refine", "count", "expected"),
    [
        ("prox_admm", "auto", 10, None),
        ("prox_admm", "auto", 9, "wanda instead of prox_admm with cg: fewer than 10"),
        ("sparsegpt", "auto", 9, "wanda instead of sparsegpt: fewer than 10"),
        ("wanda", "auto", 9, None),
        ("wanda", "cg", 9, "wanda instead of wanda with cg: fewer than 10"),
        ("wanda", "auto", 0, "largest weights kept: no calibration token"),
        ("magnitude", "cg", 9, "magnitude instead of magnitude with cg"),
    ],
)
def test_the_rule_for_few_tokens(
    method: str, refine: str, count: int, expected: str | None
) -> None:
    settings = SolverSettings(method=method, refine=refine).resolved()
    found = fallback(settings, statistics(count), 10)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.note.startswith(expected)
        assert found.settings.method in ("wanda", "magnitude")
        assert found.settings.refine == "none"
        assert found.statistics.hessian is None
        assert found.statistics.inputs is None
        assert found.statistics.diagonal is not None
        assert bool((found.statistics.diagonal > 0).all())


def test_a_layer_that_is_no_experts_has_no_threshold() -> None:
    assert fallback(SolverSettings().resolved(), statistics(1), 0) is None


def test_experts_with_few_tokens_are_listed() -> None:
    layers = [
        {"name": "layers.0.mlp.experts.0.up_proj", "tokens": 3, "statistic": "diagonal"},
        {"name": "layers.0.mlp.experts.1.up_proj", "tokens": 4, "statistic": "full"},
        {"name": "layers.0.mlp.shared_experts.up_proj", "tokens": 1, "statistic": "full"},
        {"name": "layers.1.mlp.experts.0.up_proj", "tokens": 0, "statistic": "none"},
    ]
    assert few_tokens(layers, 4) == {"layers.0.mlp.experts.0.up_proj": 3}
