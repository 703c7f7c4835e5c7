"""`prox24 bench`: which products are timed, that they are compared, and what is printed.

Times come from a clock that tests turn: no GPU is needed, and none is tested.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.command_line import run
from cluster.commands.bench import batch_ranges, bench_command, bench_text, verdict
from pipeline.config.pattern import Pattern
from pipeline.planning.shapes.model import read_shape
from pipeline.solvers.masks import holds
from pipeline.speed.machine import Machine, missing_gpu
from pipeline.speed.options import BenchConfig
from pipeline.speed.products import Measured, Product, Timed, measure_products, products_of
from pipeline.speed.whole import ModelSpeed, Workload
from storage.errors import ConfigError, NumericalError

TinyModel = Callable[..., Path]
CPU = torch.device("cpu")


class Clock:
    """Dense and 2:4 work take turns; each answer is the next of these seconds, over and over."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.asked = seconds, 0

    def __call__(self, work: Callable[[], object]) -> float:
        work()
        self.asked += 1
        return self.seconds[(self.asked - 1) % len(self.seconds)]


def machine(
    clock: Any, compress: Callable[[Tensor], Tensor] = torch.clone, free: float = 1e12
) -> Machine:
    return Machine("a CPU", CPU, clock, compress, lambda: free)


def test_the_products_of_a_model(tiny_model: TinyModel) -> None:
    """Those that share an input as one, and each shape of a layer once."""
    shape = read_shape(tiny_model("llama"), seqlen=16)
    found = {(p.title, p.rows, p.columns): p.fused for p in products_of(shape)}
    assert found == {
        ("q_proj+k_proj+v_proj", 64, 32): True,
        ("gate_proj+up_proj", 128, 32): True,
        ("q_proj, o_proj", 32, 32): False,
        ("k_proj, v_proj", 16, 32): False,
        ("gate_proj, up_proj", 64, 32): False,
        ("down_proj", 32, 64): False,
    }


def test_times_are_of_compared_products_of_sparse_weights() -> None:
    seen: list[Tensor] = []

    def compress(weight: Tensor) -> Tensor:
        seen.append(weight)
        return weight.clone()

    products = [Product(("a",), 48, 64), Product(("b",), 16, 32)]
    told: list[Product] = []
    at = machine(Clock(3.0, 2.0), compress)
    measured = measure_products(products, (1, 8), torch.float16, at, told.append)
    assert told == [each.product for each in measured] == products
    assert [tuple(w.shape) for w in seen] == [(48, 64), (16, 32)]
    assert all(holds(Pattern.parse("2:4"), w) and (w != 0).float().mean() > 0.45 for w in seen)
    for each in measured:
        assert [(t.batch, t.dense, t.sparse, t.speedup) for t in each.times] == [
            (1, 3.0, 2.0, 1.5),
            (8, 3.0, 2.0, 1.5),
        ]


def test_a_wrong_product_is_an_error() -> None:
    def wrong(weight: Tensor) -> Tensor:
        return weight.clone().index_fill_(0, torch.tensor([5]), 0)

    with pytest.raises(NumericalError, match=r"down_proj \(48 x 64\), batch size 2"):
        measure_products(
            [Product(("mlp.down_proj",), 48, 64)], (2,), torch.float16,
            machine(Clock(1.0), wrong), lambda _: None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("shape must be a multiple of (32, 64)\nmore"), "torch refuses: shape must be"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory at batch size any"),
    ],
)
def test_what_a_kernel_refuses_is_said(error: Exception, told: str) -> None:
    def refuse(_: Tensor) -> Tensor:
        raise error

    (found,) = measure_products(
        [Product(("a",), 16, 32)], (1,), torch.float16, machine(Clock(1.0), refuse), lambda _: None
    )
    assert found.times == ()
    assert str(found.problem).startswith(told)
    assert "\n" not in str(found.problem)
    assert any(told in line for line in verdict([found], []))


def test_the_table_beside_the_published_one() -> None:
    """Llama-3.1-8B's widest products at every batch size, in 80 columns."""
    batches = BenchConfig().batches()
    assert (batches[0], batches[-1], len(batches)) == (1, 32768, 16)
    fused = Product(("mlp.gate_proj", "mlp.up_proj"), 28672, 4096, fused=True)
    down = Product(("mlp.down_proj",), 4096, 14336)
    # 2:4 takes a constant time and half of what dense takes: faster from batch size 4096 on.
    times = tuple(Timed(b, dense=b * 1e-6, sparse=1e-3 + b * 5e-7) for b in batches)
    measured = [Measured(fused, times), Measured(down, times[:-1], "out of memory at batch 32768")]
    speeds = [
        ModelSpeed(Workload(1, 1), dense=0.01, sparse=0.02),
        ModelSpeed(Workload(4, 2048), dense=2.0, sparse=1.6),
        ModelSpeed(Workload(32, 1), problem="does not fit"),
    ]
    text = bench_text("Llama-3.1-8B on a GPU, float16", measured, speeds)
    assert max(map(len, text.splitlines())) <= 80
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert "gate_proj+up_proj 28672 x 4096 1.61 / 1.78 / 1.88 0.83 / 0.90 / 0.88" in lines
    assert "down_proj 4096 x 14336 1.61 / 1.78 / - 1.29 / 1.51 / 1.52" in lines
    assert {"1 0.00 0.00", "1024 0.68 0.68", "2048 1.01 1.01", "32768 1.88 -"} <= lines
    flat = " ".join(text.split())
    assert "2:4 is SLOWER than dense: gate_proj+up_proj (28672 x 4096) at batch 1-1024" in flat
    assert "not measured further: down_proj (4096 x 14336): out of memory" in flat
    assert "4 x 2048 4096 5120 1.25" in lines
    assert "2:4 is SLOWER than dense: whole model, 1 x 1 tokens" in flat
    assert "not measured: whole model, 32 x 1 tokens: does not fit" in flat


def test_runs_of_batch_sizes() -> None:
    sizes = [1, 2, 4, 8, 16]
    assert batch_ranges([1, 2, 4], sizes) == "1-4"
    assert batch_ranges([1, 4, 8, 16], sizes) == "1, 4-16"
    assert batch_ranges(sizes, sizes) == "1-16"


@pytest.mark.parametrize(
    ("architecture", "layers"),
    # Those of a block; of GPT-2 Conv1D, of Mixtral three of each of eight experts.
    [("llama", 7), ("opt", 6), ("gpt2", 4), ("mixtral", 4 + 3 * 8)],
)
def test_a_whole_model(
    tiny_model: TinyModel,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
    layers: int,
) -> None:
    """Blocks run with compressed weights; the two take twice as long as one, then the head."""
    model = tiny_model(architecture, blocks=2)
    (model / "model.safetensors").unlink()  # config.json is enough
    compressed: list[tuple[int, int]] = []

    def compress(weight: Tensor) -> Tensor:
        compressed.append((weight.shape[0], weight.shape[1]))
        return weight.clone()

    batches = BenchConfig(batch_sizes="4", dtype="bfloat16", seqlen=8, json=True)
    at = machine(Clock(1.0), compress)
    assert bench_command(str(model / "config.json"), batches, at) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(w["sequences"], w["seqlen"]) for w in found["model"]] == [
        (1, 1), (32, 1), (1, 8), (4, 8),
    ]  # fmt: skip
    for load in found["model"]:
        tokens = load["sequences"] * load["seqlen"]
        assert load["dense_tokens_per_second"] == pytest.approx(tokens / 3)
        assert load["sparse_tokens_per_second"] == pytest.approx(tokens / 3)
    assert len(compressed) == len(found["products"]) + 4 * layers
    # A block that does not fit is said, not tried.
    config = BenchConfig(batch_sizes="4", dtype="bfloat16", seqlen=8)
    assert bench_command(str(model / "config.json"), config, machine(Clock(1.0), free=10)) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "not measured: whole model, 4 x 8 tokens: does not fit" in text


@pytest.mark.skipif(missing_gpu() is None, reason="there is a GPU that can do 2:4")
def test_without_a_gpu_the_exit_status_is_3(
    tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", str(tiny_model()), "--seqlen", "16"]) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "nothing is measured" in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize("sizes", ["", "0", "1,x", "-4,8", "1.5"])
def test_bad_batch_sizes(sizes: str) -> None:
    with pytest.raises(ConfigError, match="--batch-sizes"):
        BenchConfig(batch_sizes=sizes)


@pytest.mark.cuda
def test_on_a_real_gpu(tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_model(hidden=256, intermediate=512))
    sizes = ["--batch-sizes", "1,64,1024", "--seqlen", "64", "--repeats", "3"]
    assert run(["bench", model, *sizes, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(len(product["times"]) == 3 for product in found["products"])
    assert all(load["problem"] is None for load in found["model"])
