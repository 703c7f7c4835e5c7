"""The blocks run one at a time give what the whole model gives, and layers are grouped by input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.models.forward_capture import BlockCall, LayerGroup, ModelEnds, find_groups
from pipeline.models.linears import linear_layers
from pipeline.models.skeleton import open_skeleton
from storage.errors import ModelError

CPU = torch.device("cpu")
TinyModel = Callable[..., Path]
GATED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
OPT = (("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",))
SEQLEN = 24
# In `windowed` the second block sees eight tokens only: blocks differ in their masks.
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
MODELS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "llama": ("llama", {}, GATED),
    "tied llama": ("llama", {"tied": True}, GATED),
    "llama in 3 weight files": ("llama", {"weight_files": 3}, GATED),
    "tied bfloat16 llama": ("llama", {"tied": True, "dtype": torch.bfloat16}, GATED),
    "qwen2": ("qwen2", {}, GATED),
    "windowed qwen2": ("qwen2", WINDOW, GATED),
    "mistral": ("mistral", {}, GATED),
    "windowed mistral": ("mistral", {"sliding_window": 8}, GATED),
    "opt": ("opt", {"tied": True}, OPT),
    "opt with projections": ("opt", {"word_embed_proj_dim": 16}, OPT),
    "opt that normalizes last": ("opt", {"do_layer_norm_before": False}, OPT),
}


def tokens(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, 256, (batch, SEQLEN), generator=generator)


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_block_by_block_is_the_model(tiny_model: TinyModel, case: str) -> None:
    architecture, options, _ = MODELS[case]
    folder = tiny_model(architecture, blocks=3, **options)
    skeleton = open_skeleton(folder, dtype=None, trust_remote_code=False)
    ends = ModelEnds(skeleton, CPU, head=True)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for batch in (1, 3):
        ids = tokens(batch)
        # The calls are learnt from other tokens of the same shape, as a job does.
        calls = ends.calls(tokens(batch + 10)[:batch])
        hidden_states = ends.embed(ids)
        for block, call in enumerate(calls):
            hidden_states = call.run(skeleton.load_block(block, CPU), hidden_states)
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(ends.logits(ids, hidden_states), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", MODELS)
def test_layers_that_share_an_input_are_one_group(tiny_model: TinyModel, case: str) -> None:
    architecture, options, expected = MODELS[case]
    folder = tiny_model(architecture, **options)
    skeleton = open_skeleton(folder, dtype=None, trust_remote_code=False)
    ends = ModelEnds(skeleton, CPU, head=False)
    ids = tokens(2)
    block = skeleton.load_block(1, CPU)
    groups = find_groups(block, ends.calls(ids)[1], ends.embed(ids), tuple(linear_layers(block)))
    found = [sorted(layer.split(".")[-1] for layer in group.layers) for group in groups]
    assert sorted(found) == sorted(sorted(group) for group in expected)
    for group in groups:
        assert group.name == group.layers[0]
        for layer in group.layers:
            assert block.get_submodule(layer).in_features == group.columns


class Block(nn.Module):
    """Layers a and b share an input; c gets equal values in other memory, d a freed address."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        copy = x.clone()
        y = y + self.c(copy)
        del copy
        return y + self.d(torch.zeros_like(x))


def test_a_group_shares_memory_not_values() -> None:
    call = BlockCall((), {})
    groups = find_groups(Block(), call, torch.zeros(1, 4, 8), ("a", "b", "c", "d"))
    assert groups == (LayerGroup(("a", "b"), 8), LayerGroup(("c",), 8), LayerGroup(("d",), 8))


def test_only_the_layers_asked_for_are_grouped() -> None:
    groups = find_groups(Block(), BlockCall((), {}), torch.zeros(1, 4, 8), ("b", "d"))
    assert groups == (LayerGroup(("b",), 8), LayerGroup(("d",), 8))


def test_a_layer_that_is_never_called_is_an_error() -> None:
    block = Block()
    block.unused = nn.Linear(8, 8)
    with pytest.raises(ModelError, match="unused is a linear layer that .* never calls"):
        find_groups(block, BlockCall((), {}), torch.zeros(1, 4, 8), ("a", "unused"))


def test_no_hook_is_left_behind() -> None:
    block = Block()
    find_groups(block, BlockCall((), {}), torch.zeros(1, 4, 8), ("a", "b", "c", "d"))
    assert not any(module._forward_pre_hooks for module in block.modules())


def ends_of(
    config_class: type[LlamaConfig], model_class: type[LlamaForCausalLM], folder: Path
) -> ModelEnds:
    """The ends of a tiny model of a class that transformers does not have."""
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    config = config_class(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model_class(config).save_pretrained(folder)
    return ModelEnds(open_skeleton(folder, dtype=None, trust_remote_code=False), CPU, head=False)


class TokenConfig(LlamaConfig):
    model_type = "prox24-test-tokens"


class TokenForCausalLM(LlamaForCausalLM):
    """Hands every block a table made of the tokens themselves, which cannot be replayed."""

    config_class = TokenConfig

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        return super().forward(input_ids, token_table=input_ids.float(), **options)


def test_arguments_that_depend_on_the_tokens_are_refused(tmp_path: Path) -> None:
    ends = ends_of(TokenConfig, TokenForCausalLM, tmp_path)
    with pytest.raises(ModelError, match="block 0 of TokenForCausalLM .* depend on the tokens"):
        ends.calls(tokens(2))


class BetweenConfig(LlamaConfig):
    model_type = "prox24-test-between"


class BetweenForCausalLM(LlamaForCausalLM):
    """Does something to the hidden states between two blocks, which no block's call shows."""

    config_class = BetweenConfig

    def __init__(self, config: BetweenConfig) -> None:
        super().__init__(config)
        self.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))


def test_what_is_done_between_blocks_is_refused(tmp_path: Path) -> None:
    ends = ends_of(BetweenConfig, BetweenForCausalLM, tmp_path)
    with pytest.raises(ModelError, match="BetweenForCausalLM changes .* between blocks 0 and 1"):
        ends.calls(tokens(2))
