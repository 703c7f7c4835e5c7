"""What prox24 takes for granted of transformers' private interface for loading.

A version of transformers that does otherwise fails here, function by function.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.models.experts import Experts
from pipeline.models.skeleton import open_skeleton
from pipeline.models.transformers_loading import (
    Route,
    Routes,
    convert,
    is_base_class,
    is_causal_lm,
    kept_wide,
    operations,
    sees_later_tokens,
    tie,
    tied_names,
)
from tests.support.families import FAMILIES
from tests.support.published import SIZE, change, publish
from tests.support.tiny_models import random_model

CPU = torch.device("cpu")
LLAMA = {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
MIXTRAL = LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1}


def on_meta(kind: str, **options: Any) -> PreTrainedModel:
    """A model of a class without weights."""
    config = AutoConfig.for_model(kind, **(SIZE | LLAMA | options))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def one(model: PreTrainedModel, name: str) -> Route | None:
    """What a single stored tensor becomes."""
    return next(iter(Routes(model, [name]).all), None)


def test_names() -> None:
    llama, neox = on_meta("llama"), on_meta("gpt_neox")
    norm = "model.layers.0.input_layernorm.weight"
    assert one(llama, norm) == Route(norm, norm)
    assert one(llama, "layers.0.input_layernorm.weight") == Route(norm[6:], norm)
    assert one(neox, "embed_out.weight") == Route("embed_out.weight", "lm_head.weight")
    # Its own name, too, which no renaming is for.
    assert one(neox, "lm_head.weight") == Route("lm_head.weight", "lm_head.weight")
    for name in ("model.rotary_emb.inv_freq", "model.layers.7.mlp.up_proj.weight", "nothing"):
        assert one(llama, name) is None


def test_a_name_of_the_model_that_a_renaming_for_older_files_meets() -> None:
    """transformers tries such a name as it is once the renamed one is none of the model's."""
    mixtral = on_meta("mixtral", **MIXTRAL)
    name = "model.layers.0.mlp.experts.down_proj"
    route = one(mixtral, name)
    assert route is not None
    assert (route.target, route.pattern) == (name, None)


def test_experts_are_merged_in_order() -> None:
    mixtral = on_meta("mixtral", **MIXTRAL)
    prefix = "model.layers.0.block_sparse_moe.experts"
    stored = [f"{prefix}.{expert}.{part}.weight" for expert in (1, 0) for part in ("w3", "w1")]
    rules = Routes(mixtral, stored)
    target = "model.layers.0.mlp.experts.gate_up_proj"
    routes = rules.of([target])[target]
    assert len(routes) == 4
    assert rules.merged(target)
    assert not rules.merged("model.layers.0.mlp.gate.weight")
    pattern = routes[0].pattern
    assert pattern is not None
    tensors = [
        (route, torch.full((2, 3), float(".experts.1." in route.stored))) for route in routes
    ]
    made = convert(rules.converter(pattern), target, tensors, mixtral)[target]
    assert made.shape == (2, 4, 3)
    assert made[:, 0, 0].tolist() == [0.0, 1.0]
    assert operations(rules.converter(pattern)) == "MergeModulelist, Concatenate"


def test_one_tensor_that_becomes_several() -> None:
    hrm = on_meta("hrm_text")
    name = next(n for n in hrm.state_dict() if n.endswith("mlp.gate_proj.weight"))
    fused = name.replace("gate_proj", "gate_up_proj")
    rules = Routes(hrm, [fused])
    (route,) = rules.all
    assert rules.targets(route) == (name, name.replace("gate_proj", "up_proj"))
    assert route.pattern is not None
    both = torch.arange(8.0).view(4, 2)
    made = convert(rules.converter(route.pattern), route.target, [(route, both)], hrm)
    assert [made[n].tolist() for n in rules.targets(route)] == [
        both[:2].tolist(),
        both[2:].tolist(),
    ]


def test_ties() -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    assert tied_names(on_meta("llama")) == {}
    for missing, tied in (({head}, True), ({embedding}, True), (set(), False)):
        model: Any = on_meta("llama", tie_word_embeddings=True)
        assert tied_names(model) == {head: embedding}
        tie(model, missing)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    arguments = inspect.signature(PreTrainedModel.tie_weights).parameters
    assert {"missing_keys", "recompute_mapping"} <= arguments.keys()


def test_what_stays_wide() -> None:
    model = on_meta("llama")
    model._keep_in_fp32_modules = {"norm"}  # type: ignore[assignment]
    model._keep_in_fp32_modules_strict = {"gate.*bias"}  # type: ignore[assignment]
    for dtype, names in (
        (torch.float32, set()),
        (torch.bfloat16, {"gate.x.bias"}),
        (torch.float16, {"gate.x.bias", "model.norm.weight"}),
    ):
        found = {
            name
            for name in ("gate.x.bias", "model.norm.weight")
            if any(p.search(name) for p in kept_wide(model, dtype))
        }
        assert found == names
        assert len(kept_wide(model, dtype)) == len(model._get_dtype_plan(dtype))


@pytest.mark.parametrize(
    ("kind", "options", "encoder"),
    [
        ("llama", {}, False),
        ("gpt_neox", {}, False),
        ("bart", {"is_encoder_decoder": False, "d_model": 32}, False),
        ("bert", {"is_decoder": True}, False),
        ("bert", {}, True),
        ("big_bird", {}, True),
        ("bert-generation", {}, True),
        ("gemma3_text", {"head_dim": 8}, False),
        ("gemma3_text", {"head_dim": 8, "use_bidirectional_attention": True}, True),
    ],
)
def test_encoders(kind: str, options: dict[str, Any], encoder: bool) -> None:
    assert sees_later_tokens(on_meta(kind, **options)) == encoder


def test_classes() -> None:
    assert is_causal_lm("bloom")
    assert not is_causal_lm("t5")
    assert is_base_class("BloomModel", "bloom")
    assert not is_base_class("BloomForSequenceClassification", "bloom")
    assert not is_base_class("BloomModel", None)


@pytest.mark.parametrize("name", [*FAMILIES, "mixtral", "deepseek_v3"])
def test_each_tensor_is_what_transformers_loads(tmp_path: Path, name: str) -> None:
    """In float16: values, dtypes, and what is left over."""
    folder = tmp_path / "model"
    if name in FAMILIES:
        random_model(FAMILIES[name].config()).half().save_pretrained(folder)
    else:
        moe = {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
               "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
               "v_head_dim": 8, "first_k_dense_replace": 0}  # fmt: skip
        publish(
            folder, name, dtype=torch.float16, **(MIXTRAL if name == "mixtral" else LLAMA | moe)
        )
    change(folder, lambda tensors: tensors.update(nobody=torch.zeros(2)))
    expected, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    skeleton = open_skeleton(folder, dtype=None, trust_remote_code=False)
    assert set(load_file(folder / "model.safetensors")) - skeleton.loaded == {"nobody"}
    assert set(info["unexpected_keys"]) == {"nobody"}
    model = skeleton.load_ends(CPU, head=True)
    blocks = model.get_submodule(skeleton.blocks_path)
    for number in range(len(skeleton.blocks)):
        blocks[number] = skeleton.load_block(number, CPU)  # type: ignore[operator]
    apart = [path for path, module in model.named_modules() if isinstance(module, Experts)]
    found = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    theirs = dict(expected.named_parameters(remove_duplicate=False)) | dict(
        expected.named_buffers()
    )
    whole = {n for n in theirs if not n.startswith(tuple(apart) or "-")}
    assert whole == {n for n in found if not n.startswith(tuple(apart) or "-")}
    for tensor in whole:
        assert found[tensor].dtype == theirs[tensor].dtype, tensor
        assert torch.equal(found[tensor], theirs[tensor]), tensor


def test_the_first_of_two_names_of_one_tensor_is_taken(tmp_path: Path) -> None:
    folder = publish(tmp_path / "model", "llama", **LLAMA)

    def how(tensors: dict[str, torch.Tensor]) -> None:
        tensors["norm.weight"] = torch.full((32,), 3.0)

    change(folder, how)
    expected = AutoModelForCausalLM.from_pretrained(folder).model.norm.weight
    skeleton = open_skeleton(folder, dtype=None, trust_remote_code=False)
    assert torch.equal(skeleton.load_ends(CPU, head=True).model.norm.weight, expected)
    assert not (skeleton.loaded >= {"norm.weight", "model.norm.weight"})
