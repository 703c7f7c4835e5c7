"""Products and attention in pieces give what torch gives, and the same bytes on any threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from pipeline.models.forward_capture import ModelEnds
from pipeline.models.skeleton import open_skeleton
from pipeline.runtime import products
from pipeline.runtime.products import InPieces, product
from pipeline.runtime.threads import in_pieces, set_threads
from tests.support.families import FAMILIES
from tests.support.moe_models import save_moe
from tests.support.tiny_models import random_model

THREADS = (1, 2, 3, 5)
CPU = torch.device("cpu")


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tiny products are cut too; the list gets the number of pieces of each that is."""
    counted: list[int] = []

    def counting(work: Callable[[Any], object], pieces: list[Any]) -> None:
        counted.append(len(pieces))
        in_pieces(work, pieces)

    for name, value in (("LEAST_ROWS", 32), ("_LEAST_COLUMNS", 16), ("_LEAST_OPERATIONS", 256)):
        monkeypatch.setattr(products, name, value)
    monkeypatch.setattr(products, "in_pieces", counting)
    yield counted
    set_threads(1)


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator)


LEFT, RIGHT, FEW, BIAS = normal(2, 45, 24), normal(40, 24), normal(3, 24), normal(40)
QUERY, KEY, VALUE = normal(2, 6, 20, 8), normal(2, 3, 24, 8), normal(2, 3, 24, 4)
SQUARE = normal(2, 6, 20, 8).flip(2)
CAUSAL = torch.ones(20, 20, dtype=torch.bool).tril()
PADDED = torch.ones(2, 1, 20, 20, dtype=torch.bool).index_fill(3, torch.tensor([3, 4]), False)
BY_HEAD = normal(6, 20, 20)

# Name -> a call, with an argument for the dtype. Those that are not to be cut are below.
CALLS: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
    "linear": lambda to: functional.linear(to(LEFT), to(RIGHT)),
    "linear with bias": lambda to: functional.linear(to(LEFT), to(RIGHT), to(BIAS)),
    "linear of few rows": lambda to: functional.linear(to(FEW), to(RIGHT), bias=to(BIAS)),
    "a module": lambda to: to_module(to)(to(LEFT)),
    "addmm": lambda to: torch.addmm(to(BIAS), to(LEFT)[0], to(RIGHT).T),
    "matmul": lambda to: torch.matmul(to(LEFT), to(RIGHT).T),
    "the operator @": lambda to: to(LEFT)[0] @ to(RIGHT).T,
    "matmul of batches": lambda to: to(QUERY).matmul(to(SQUARE).transpose(2, 3)),
    "bmm": lambda to: torch.bmm(to(QUERY)[0], to(SQUARE)[1].mT),
    "baddbmm": lambda to: to(normal(6, 1, 20)).baddbmm(
        batch1=to(QUERY)[0], batch2=to(SQUARE)[0].mT, beta=0.5, alpha=0.25
    ),
    "attention": lambda to: functional.scaled_dot_product_attention(
        to(QUERY), to(SQUARE), to(QUERY), is_causal=True, scale=0.3
    ),
    "attention with a mask": lambda to: functional.scaled_dot_product_attention(
        to(QUERY), to(SQUARE), to(QUERY), attn_mask=CAUSAL
    ),
    "attention with a mask for each sequence": lambda to: functional.scaled_dot_product_attention(
        to(QUERY), to(SQUARE), to(QUERY), attn_mask=PADDED
    ),
    "attention with a mask for each head": lambda to: functional.scaled_dot_product_attention(
        to(QUERY), to(SQUARE), to(QUERY), attn_mask=to(BY_HEAD)
    ),
    "attention with fewer keys": lambda to: functional.scaled_dot_product_attention(
        to(QUERY), to(KEY), to(VALUE), enable_gqa=True
    ),
}
WHOLE: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
    "a vector": lambda to: to(LEFT)[0] @ to(RIGHT)[0],
    "broadcast batches": lambda to: torch.matmul(to(QUERY), to(SQUARE)[:1].mT),
    "a bias for each row": lambda to: torch.addmm(
        to(normal(45, 40)), to(LEFT)[0], to(RIGHT).T, beta=2
    ),
    "no rows": lambda to: functional.linear(to(LEFT)[:0], to(RIGHT)),
    "integers": lambda to: CAUSAL.long() @ CAUSAL.long(),
}


def to_module(to: Callable[[Tensor], Tensor]) -> nn.Linear:
    layer = nn.Linear(24, 40)
    layer.weight, layer.bias = nn.Parameter(to(RIGHT)), nn.Parameter(to(BIAS))
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CALLS, *WHOLE])
@torch.no_grad()
def test_a_function_in_pieces(cuts: list[int], name: str, dtype: torch.dtype) -> None:
    function = (CALLS | WHOLE)[name]
    expected = function(lambda tensor: tensor.to(dtype))
    found = []
    for count in THREADS:
        set_threads(count)
        with InPieces():
            found.append(function(lambda tensor: tensor.to(dtype)))
    assert bool(cuts) == (name in CALLS)
    assert all(pieces > 1 for pieces in cuts)
    assert all(torch.equal(found[0], other) for other in found)
    assert (found[0].shape, found[0].dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(found[0], expected)


def test_gradients_are_not_lost(cuts: list[int]) -> None:
    layer = to_module(lambda tensor: tensor)
    with InPieces():
        layer(LEFT).sum().backward()
    assert not cuts
    assert layer.weight.grad is not None


def test_the_product_of_statistics(cuts: list[int]) -> None:
    """Also where the left one is a transpose, and where nothing is cut."""
    found = []
    for count in THREADS:
        set_threads(count)
        found.append(product(normal(70, 64).T, normal(70, 33)))
        assert torch.equal(product(LEFT[0, :1], RIGHT[:1].T), LEFT[0, :1] @ RIGHT[:1].T)
    assert cuts
    assert all(torch.equal(found[0], other) for other in found)
    torch.testing.assert_close(found[0], normal(70, 64).T @ normal(70, 33))


def test_a_wide_model_is_cut_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sizes of a piece allow: 4,096 tokens of width 576, as SmolLM2 has."""
    counted = []
    monkeypatch.setattr(products, "in_pieces", lambda _, pieces: counted.append(len(pieces)))
    with torch.no_grad(), InPieces():
        functional.linear(torch.empty(4, 1024, 576), torch.empty(1536, 576))
        functional.linear(torch.empty(1, 1, 576), torch.empty(49152, 576))
        heads = torch.empty(4, 9, 1024, 64)
        functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        torch.empty(4096, 576).T @ torch.empty(4096, 256)
    assert counted == [16, 2, 12, 2]


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("llama", "gpt2", "bloom", "mpt", "mixtral", "gpt_oss") else
        pytest.param(name, marks=pytest.mark.slow)
        for name in (*FAMILIES, "mixtral", "gpt_oss", "deepseek_v3")
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_forward_in_pieces_is_the_models(cuts: list[int], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    if name in FAMILIES:
        random_model(FAMILIES[name].config()).save_pretrained(folder)
    else:
        save_moe(folder, name)
    skeleton = open_skeleton(folder, dtype=None, trust_remote_code=False)
    ends = ModelEnds(skeleton, CPU, head=True)
    tokens = torch.arange(64).reshape(2, 32) * 5 % 256
    calls = ends.calls(tokens.flip(0, 1))
    blocks = [skeleton.load_block(index, CPU) for index in range(len(calls))]
    logits = []
    for count in THREADS:
        set_threads(count)
        hidden_states = ends.embed(tokens)
        for block, call in zip(blocks, calls, strict=True):
            hidden_states = call.run(block, hidden_states)
        logits.append(ends.logits(tokens, hidden_states))
    assert cuts
    assert all(torch.equal(logits[0], other) for other in logits)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=tokens).logits
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-6)
