"""All experts of a block in one stored tensor: where each matrix is, and what a block computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.config.prune import PruneConfig
from pipeline.models.experts import send_every_token, unstack_experts
from pipeline.models.forward_capture import ModelEnds
from pipeline.models.linears import linear_layers, unsupported_parameters, unsupported_reason
from pipeline.models.selection import select_layers
from pipeline.models.skeleton import open_skeleton
from pipeline.output.keep_mask import KeepMask, masks_of
from pipeline.planning.shapes.model import read_shape
from storage.errors import CorruptFileError, ModelError
from storage.model.files import ModelFiles, fingerprint_weight_file
from tests.support.moe_models import (
    EXPERTS,
    FAMILIES,
    FIRST_DENSE,
    HIDDEN,
    INNER,
    STACKED,
    expert_matrices,
    load,
    loud,
    save_moe,
    stacked_experts,
    token_ids,
)
from tests.support.tiny_models import VOCABULARY

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("experts")
    return {family: save_moe(folder / family, family) for family in STACKED}


def blockwise(folder: Path, ids: Tensor, *, every_token: bool = False) -> Tensor:
    """The logits of a model whose blocks are read and run one at a time."""
    skeleton = open_skeleton(folder, dtype=None, trust_remote_code=False)
    ends = ModelEnds(skeleton, CPU, head=True)
    hidden = ends.embed(ids)
    for number, call in enumerate(ends.calls(ids)):
        block = skeleton.load_block(number, CPU)
        if every_token:
            send_every_token(block)
        hidden = call.run(block, hidden)
    return ends.logits(ids, hidden)


@pytest.mark.parametrize("family", STACKED)
@torch.no_grad()
def test_blocks_compute_what_the_whole_model_does(models: dict[str, Path], family: str) -> None:
    """This is what fails where an installed transformers computes a family otherwise."""
    ids = token_ids()
    expected = load(models[family])(input_ids=ids, use_cache=False).logits
    found = blockwise(models[family], ids)
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    observed = blockwise(models[family], ids, every_token=True)
    assert torch.allclose(observed, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", STACKED)
def test_every_expert_matrix_is_a_part_of_one_tensor(models: dict[str, Path], family: str) -> None:
    skeleton = open_skeleton(models[family], dtype=None, trust_remote_code=False)
    stored = load_file(models[family] / "model.safetensors")
    experts = stacked_experts(load(models[family]))
    assert len(experts) == 2 - (family in FIRST_DENSE)
    for path, module in experts.items():
        block, own = path.removeprefix("model.layers.").split(".", 1)
        for name, matrix in expert_matrices(module, together=True).items():
            weight = skeleton.read_weight(int(block), f"{own}.{name}")
            assert torch.equal(weight, matrix)
            part = skeleton.part(int(block), f"{own}.{name}")
            assert part is not None
            whole = stored[part.tensor]
            assert torch.equal(part.as_stored(weight), whole[part.index : part.index + 1])
            rows = skeleton.read_weight(int(block), f"{own}.{name}", (3, 9))
            assert torch.equal(rows, matrix[3:9])
            size = skeleton.stored_bytes(int(block), f"{own}.{name}")
            assert size == weight.nbytes
    # Every other tensor of the files has its parameter as well.
    assert {skeleton.tensor_name(name) for name in skeleton.model.state_dict()} == set(stored)


@pytest.mark.parametrize("family", STACKED)
def test_routers_biases_and_sinks_are_no_layers(models: dict[str, Path], family: str) -> None:
    skeleton = open_skeleton(models[family], dtype=None, trust_remote_code=False)
    layers = linear_layers(skeleton.blocks[1])
    experts = {name: shape for name, shape in layers.items() if ".experts." in name}
    assert set(experts.values()) == {(2 * INNER, HIDDEN), (HIDDEN, INNER)}
    assert len(experts) == 2 * EXPERTS
    shared = {"llama4_text": "feed_forward.shared_expert", "aria_text": "mlp.shared_experts"}
    assert (f"{shared.get(family)}.up_proj" in layers) == (family in shared)
    assert not [name for name in layers if "router" in name or "sinks" in name]
    assert select_layers(skeleton, PruneConfig().layer_rules()).skipped == {}


@pytest.mark.parametrize("family", STACKED)
def test_a_plan_counts_the_experts_of_a_stack(models: dict[str, Path], family: str) -> None:
    """From the headers, and from config.json alone."""
    for source in (models[family], models[family] / "config.json"):
        shape = read_shape(source, seqlen=16)
        assert shape.unsupported is None
        groups = [group for group in shape.kind(1).groups if group.experts]
        layers = [(name.rpartition(".")[2], *size) for g in groups for name, *size in g.layers]
        first, last = ("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)
        assert sorted(layers) == [last] * EXPERTS + [first] * EXPERTS
        assert {(group.experts, group.active) for group in groups} == {(EXPERTS, 2)}


@torch.no_grad()
def test_a_family_that_is_published_apart_may_be_stored_together(tmp_path: Path) -> None:
    folder = save_moe(tmp_path / "model", "qwen3_moe")
    model = load(folder)
    ids = token_ids()
    expected = model(input_ids=ids, use_cache=False).logits
    model.save_pretrained(folder, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(folder / "model.safetensors")
    skeleton = open_skeleton(folder, dtype=None, trust_remote_code=False)
    assert "mlp.experts.3.gate_up_proj" in linear_layers(skeleton.blocks[0])
    assert torch.allclose(blockwise(folder, ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inner", [INNER, HIDDEN])
def test_a_stack_that_transformers_transposes_on_loading(tmp_path: Path, inner: int) -> None:
    """Qwen3-VL's are published as (experts, C, R); a square one is taken as transformers takes
    it."""
    text = {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": inner,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "decoder_sparse_step": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "deepstack_visual_indexes": [0],
    }
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision)
    loud(AutoModelForImageTextToText.from_config(config)).save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    skeleton = open_skeleton(tmp_path, dtype=None, trust_remote_code=False)
    (experts,) = stacked_experts(model).values()
    for name, matrix in expert_matrices(experts, together=True).items():
        assert torch.equal(skeleton.read_weight(0, f"mlp.experts.{name}"), matrix)
    turned = skeleton.stored_transposed(0, "mlp.experts.0.down_proj")
    stored = load_file(tmp_path / "model.safetensors")
    name = skeleton.weight_name(0, "mlp.experts.0.down_proj")
    assert turned == (not torch.equal(stored[name], experts.down_proj))


def test_the_readme_has_every_mixture_of_the_tests(repository: Path) -> None:
    readme = (repository / "docs" / "models.md").read_text(encoding="utf-8")
    section = readme.partition("### Mixtures of experts")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")] for line in section.splitlines()]
    said = {row[2].strip("`"): row[3] for row in rows if len(row) == 6 and "`" in row[2]}
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert said.keys() == {names[family] for family in (*FAMILIES, *STACKED)}
    together = {name for name, stored in said.items() if "in one tensor" in stored}
    assert together == {names[family] for family in STACKED}


# -- refusals and damage -------------------------------------------------------------------------


def test_a_stack_of_another_number_of_experts(tmp_path: Path) -> None:
    folder = save_moe(tmp_path, "gpt_oss")
    change(folder, "model.layers.1.mlp.experts.down_proj", lambda tensor: tensor[:3].clone())
    with pytest.raises(ModelError, match=r"down_proj has shape \[3, 16, 32\].* has 4 experts"):
        open_skeleton(folder, dtype=None, trust_remote_code=False)


def test_a_stack_of_another_shape(tmp_path: Path) -> None:
    folder = save_moe(tmp_path, "gpt_oss")
    change(folder, "model.layers.0.mlp.experts.down_proj", lambda t: t.mT.contiguous())
    with pytest.raises(
        ModelError, match=r"down_proj has shape \[4, 32, 16\].*makes model.*\[32, 1"
    ):
        open_skeleton(folder, dtype=None, trust_remote_code=False)


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    folder = save_moe(tmp_path, "gpt_oss")
    change(folder, "model.layers.1.mlp.experts.down_proj_bias", None)
    with pytest.raises(
        ModelError, match=r"lack model\.layers\.1\.mlp\.experts\.0\.down_proj\.bias"
    ):
        open_skeleton(folder, dtype=None, trust_remote_code=False)


def change(folder: Path, name: str, make: object) -> None:
    """Replaces a stored tensor by what `make` makes of it, or leaves it out."""
    path = folder / "model.safetensors"
    stored = load_file(path)
    tensor = stored.pop(name)
    if callable(make):
        stored[name] = make(tensor)
    save_file(stored, path, {"format": "pt"})


def test_one_expert_is_read_only_of_the_stack_that_was_expected(models: dict[str, Path]) -> None:
    """The hash of a stack is compared when the first of its experts is read."""
    files = ModelFiles.open(models["gpt_oss"])
    name = "model.layers.0.mlp.experts.gate_up_proj"
    files.expected = fingerprint_weight_file(models["gpt_oss"], files.files[0]).tensors
    whole = load_file(models["gpt_oss"] / files.files[0])[name]
    for number in range(EXPERTS):
        assert torch.equal(files.read(name, rows=(number, number + 1))[0], whole[number])
    other = ModelFiles.open(models["gpt_oss"])
    other.expected = dict(files.expected) | {name: "0" * 64}
    with pytest.raises(CorruptFileError, match="gate_up_proj is not what it was"):
        other.read(name, rows=(1, 2))


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
@torch.no_grad()
def test_transposed_stacks_keep_their_zeros_in_training(
    models: dict[str, Path], family: str
) -> None:
    model = load(models[family])
    assert not masks_of(model)
    for module in stacked_experts(model).values():
        module.down_proj[:, ::2] = 0
    assert {mask.shape for mask in masks_of(model).values()} == {(EXPERTS, HIDDEN, INNER)}
    keep = KeepMask(model)
    for parameter in model.parameters():
        parameter.add_(1)
    keep.on_optimizer_step(None, None, None)
    for module in stacked_experts(model).values():
        assert not module.down_proj[:, ::2].any()
        assert bool(module.down_proj[:, 1::2].all())
        assert bool(module.gate_up_proj.all())


@pytest.mark.parametrize("family", ["jetmoe", "longcat_flash"])
def test_experts_that_are_computed_otherwise_are_refused(family: str) -> None:
    """In modules of their own, or with some that hand their input through."""
    with torch.device("meta"):
        config = AutoConfig.for_model(family)
        config.num_hidden_layers = config.num_layers = 1
        model = AutoModelForCausalLM.from_config(config)
    unstack_experts(model)
    block = model.model.layers[0]
    reason = unsupported_reason(block, unsupported_parameters(block))
    assert "experts" in reason or "mlp.input_linear" in reason
    assert "is computed in a way that prox24 cannot take apart" in reason
