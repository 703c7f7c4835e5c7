"""A causal LM taken apart, one block's tensors at a time, and what is refused before compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from pipeline.config.layers import LayerRules
from pipeline.config.prune import ModelOptions
from pipeline.models.selection import select_layers
from pipeline.models.skeleton import (
    Skeleton,
    check_seqlen,
    check_tokens,
    find_blocks,
    open_skeleton,
)
from storage.errors import ConfigError, ModelError
from tests.support.tiny_models import ARCHITECTURES, random_model, split_weight_file, tiny_config

CPU = torch.device("cpu")
TinyModel = Callable[..., Path]


def open_model(folder: Path, dtype: str | None = None) -> Skeleton:
    return open_skeleton(folder, dtype=dtype, trust_remote_code=False)


def rules(**options: Any) -> LayerRules:
    return ModelOptions(**options).layer_rules()


def edit_config(folder: Path, **changes: object) -> None:
    """Changes keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def one_file_per_part(folder: Path) -> None:
    """Weight files `block-0.safetensors`, ..., and `ends.safetensors` for all the rest."""
    tensors = load_file(folder / "model.safetensors")
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        _, inside, rest = name.partition(".layers.")
        part = f"block-{rest.split('.')[0]}" if inside else "ends"
        parts.setdefault(f"{part}.safetensors", {})[name] = tensor
    for file, contents in parts.items():
        save_file(contents, folder / file, {"format": "pt"})
    weight_map = {name: file for file, contents in parts.items() for name in contents}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("weight_files", [1, 3])
def test_a_block_has_the_weights_of_the_whole_model(
    tiny_model: TinyModel, architecture: str, weight_files: int
) -> None:
    folder = tiny_model(architecture, weight_files=weight_files)
    skeleton = open_model(folder)
    whole = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert len(skeleton.blocks) == 2
    assert all(p.is_meta for p in skeleton.model.parameters())
    for block in range(2):
        state = skeleton.load_block(block, CPU).state_dict()
        prefix = skeleton.block_prefix(block)
        assert {prefix + name for name in state} == {n for n in whole if n.startswith(prefix)}
        for name, tensor in state.items():
            assert torch.equal(tensor, whole[prefix + name])


def test_only_the_tensors_of_a_block_are_read(tiny_model: TinyModel) -> None:
    """The weight files of all other parts are gone by then."""
    folder = tiny_model("llama", blocks=3)
    one_file_per_part(folder)
    skeleton = open_model(folder)
    for file in ("block-0.safetensors", "block-2.safetensors", "ends.safetensors"):
        (folder / file).unlink()
    assert not any(p.is_meta for p in skeleton.load_block(1, CPU).parameters())
    with pytest.raises(ModelError, match=r"block-2\.safetensors"):
        skeleton.load_block(2, CPU)


def test_the_ends_are_read_without_any_block(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama", blocks=3)
    one_file_per_part(folder)
    skeleton = open_model(folder)
    for file in folder.glob("block-*.safetensors"):
        file.unlink()
    model = skeleton.load_ends(CPU, head=True)
    on_meta = {name for name, p in model.named_parameters() if p.is_meta}
    assert on_meta == {n for n, _ in model.named_parameters() if n.startswith("model.layers.")}


def test_without_the_head_the_output_embedding_is_not_read(tiny_model: TinyModel) -> None:
    skeleton = open_model(tiny_model("llama"))
    assert skeleton.load_ends(CPU, head=False).lm_head.weight.is_meta
    tied = open_model(tiny_model("llama", tied=True))
    model = tied.load_ends(CPU, head=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta


@pytest.mark.parametrize(
    ("asked", "stored", "forward"),
    [
        (None, torch.bfloat16, torch.bfloat16),
        (None, torch.float32, torch.float32),
        ("float32", torch.bfloat16, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
    ],
)
def test_the_forward_dtype(
    tiny_model: TinyModel, asked: str | None, stored: torch.dtype, forward: torch.dtype
) -> None:
    skeleton = open_model(tiny_model("llama", dtype=stored), asked)
    assert skeleton.dtype == forward
    block = skeleton.load_block(0, CPU)
    assert {p.dtype for p in block.parameters()} == {forward}
    ends = skeleton.load_ends(CPU, head=True)
    # Rotary frequencies are float32 in every model, whatever the dtype of its weights.
    assert ends.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_config_without_dtype_takes_that_of_the_weights(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama", dtype=torch.bfloat16)
    edit_config(folder, dtype=None, torch_dtype=None)
    assert open_model(folder).dtype == torch.bfloat16


def test_weights_saved_without_the_head_are_found(tiny_model: TinyModel) -> None:
    """Such names lack the base model's prefix: `layers.0...`, not `model.layers.0...`."""
    folder = tiny_model("llama", tied=True)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    edit_config(folder, architectures=["LlamaForCausalLM"])
    assert "layers.0.mlp.up_proj.weight" in load_file(folder / "model.safetensors")
    skeleton = open_model(folder)
    assert skeleton.weight_name(1, "mlp.up_proj") == "layers.1.mlp.up_proj.weight"
    up = skeleton.load_block(1, CPU).mlp.up_proj.weight
    assert torch.equal(up, expected["model.layers.1.mlp.up_proj.weight"])


# -- refusals -----------------------------------------------------------------------------------


def refused(folder: Path, *names: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    for name in names:
        assert name in message


def save_config(folder: Path, model_type: str, architecture: str, **options: object) -> Path:
    """A model folder with a config and one tensor: more is not looked at before the refusal."""
    config = AutoConfig.for_model(model_type, **options)
    config.architectures = [architecture]
    config.save_pretrained(folder)
    save_file({"weight": torch.zeros(4, 4)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_encoder(tmp_path: Path) -> None:
    folder = save_config(tmp_path, "bert", "BertForMaskedLM", num_hidden_layers=2)
    refused(folder, str(folder), "BertForMaskedLM", "not a causal LM")


def test_an_encoder_decoder(tmp_path: Path) -> None:
    folder = save_config(tmp_path, "t5", "T5ForConditionalGeneration", num_layers=2)
    refused(folder, str(folder), "encoder-decoder")


def test_no_decoder_blocks_of_linears(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama"))
    model.config.num_hidden_layers = 3
    with pytest.raises(ModelError, match="no list of 3 decoder blocks .* LlamaForCausalLM"):
        find_blocks(model, tmp_path)


def test_weights_outside_linears(tmp_path: Path) -> None:
    """JetMoE's experts are stacked in modules of their own: they would stay dense unseen."""
    config = AutoConfig.for_model(
        "jetmoe",
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match="three dimensions .a stack of experts.*cannot take.*JetMoe"
    ):
        select_layers(open_model(tmp_path), rules())


def test_no_architectures(tiny_model: TinyModel) -> None:
    folder = tiny_model()
    edit_config(folder, architectures=None)
    refused(folder, "config.json", "architectures", "LlamaForCausalLM")


def test_an_unknown_model_type(tiny_model: TinyModel) -> None:
    folder = tiny_model()
    edit_config(folder, model_type="no-such-model")
    refused(folder, "config.json", "no-such-model")


def test_a_missing_tensor(tiny_model: TinyModel) -> None:
    folder = tiny_model()
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, str(folder), "model.layers.1.mlp.up_proj.weight", "LlamaForCausalLM")


def test_a_missing_head_that_is_not_tied(tiny_model: TinyModel) -> None:
    folder = tiny_model()
    edit_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, "lm_head.weight")


def test_a_tensor_of_the_wrong_shape(tiny_model: TinyModel) -> None:
    folder = tiny_model()
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(16, 28)}))
    refused(folder, name, "[16, 28]", "[16, 32]", "config.json")


def test_fewer_blocks_than_the_config_says(tiny_model: TinyModel) -> None:
    folder = tiny_model()
    edit_config(folder, num_hidden_layers=3)
    refused(folder, "model.layers.2.")


def test_a_width_that_the_pattern_does_not_divide(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama", intermediate=70)
    skeleton = open_model(folder)
    with pytest.raises(ConfigError) as caught:
        select_layers(skeleton, rules())
    for name in ("model.layers.0.mlp.down_proj", "70", "4", "--skip-unsupported"):
        assert name in str(caught.value)
    selection = select_layers(skeleton, rules(skip_unsupported=True))
    assert selection.pruned == 12
    assert set(selection.skipped) == {f"model.layers.{n}.mlp.down_proj" for n in (0, 1)}
    # The same layers under a pattern that does divide their width.
    assert select_layers(skeleton, rules(pattern="1:2")).pruned == 14


def test_no_layer_left_to_prune(tiny_model: TinyModel) -> None:
    skeleton = open_model(tiny_model("llama"))
    with pytest.raises(ModelError, match="no layer is left"):
        select_layers(skeleton, rules(pattern="3:7", skip_unsupported=True))


def test_seqlen_above_the_maximum(tiny_model: TinyModel) -> None:
    skeleton = open_model(tiny_model("opt", positions=64))
    check_seqlen(skeleton, 64)
    with pytest.raises(ConfigError, match="--seqlen 65 .* maximum of 64"):
        check_seqlen(skeleton, 65)


def test_a_tokenizer_of_another_model(tiny_model: TinyModel) -> None:
    skeleton = open_model(tiny_model())
    check_tokens(skeleton, torch.tensor([[0, 259]]))
    with pytest.raises(ModelError, match="token 260.*embeds 260"):
        check_tokens(skeleton, torch.tensor([[0, 260]]))


def test_many_weight_files_are_checked_alike(tiny_model: TinyModel) -> None:
    folder = tiny_model()
    edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    split_weight_file(folder, 3)
    refused(folder, "model.norm.weight")
