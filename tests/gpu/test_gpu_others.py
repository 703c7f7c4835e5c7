"""What else runs on a GPU: evaluation, likelihoods, distances, `prox24 bench`, training; and that
`--device cpu` is obeyed where there is one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config.evaluate import EvalConfig
from pipeline.config.pattern import Pattern
from pipeline.config.solve import SolveConfig
from pipeline.config.solver import SolverSettings
from pipeline.evaluation.likelihood import log_likelihoods
from pipeline.evaluation.perplexity import compare, evaluate
from pipeline.models.skeleton import open_skeleton
from pipeline.output.keep_mask import KeepMask
from pipeline.planning.shapes.model import read_shape
from pipeline.runtime.progress import Silent
from pipeline.solve_layer import solve_layer
from pipeline.solvers.kernels.prox_operator import prox_operator
from pipeline.solvers.masks import holds
from pipeline.solvers.registry import solver_for
from pipeline.speed.machine import Machine
from pipeline.speed.products import Product, measure_products
from pipeline.speed.whole import Workload, measure_model
from pipeline.statistics.accumulate import Accumulator
from pipeline.worker.local_executor import LocalExecutor
from storage.run.layer_files import write_layer_file
from tests.support.fake_gpu import Record, fake_gpu
from tests.support.fake_gpu.jobs import Checked, check_no_cpu, check_products
from tests.support.jobs import prune_here, write_text
from tests.support.multimodal import save_wrapper

TinyModel = Callable[..., Path]


@pytest.fixture
def gpu() -> Iterator[Record]:
    with fake_gpu() as record:
        yield record
    assert record.live == 0


@pytest.fixture
def model(tiny_model: TinyModel) -> Path:
    return tiny_model("llama", hidden=16, intermediate=32, dtype=torch.bfloat16)


def settings(tmp_path: Path, device: str, **options: Any) -> EvalConfig:
    text = write_text(tmp_path / "text.txt", 256)
    values = {"dataset": str(text), "seqlen": 32, "batch_size": 2, "threads": 1}
    return EvalConfig(executor="local", device=device, **(values | options))


def here() -> LocalExecutor:
    return LocalExecutor(1, 1)


def test_perplexity(model: Path, tmp_path: Path, gpu: Record) -> None:
    cpu = evaluate(model, settings(tmp_path, "cpu"), here, Silent())
    assert not gpu.kernels
    found = evaluate(model, settings(tmp_path, "cuda"), lambda: Checked(1, gpu), Silent())
    assert found["perplexity"] == cpu["perplexity"]
    check_products(gpu, "bfloat16")


def test_likelihoods(model: Path, tmp_path: Path, gpu: Record) -> None:
    draw = random.Random(0)
    requests = [
        (draw.choices(range(256), k=context), draw.choices(range(256), k=size))
        for context, size in ((9, 1), (3, 2), (20, 3))
    ]
    skeleton = open_skeleton(model, dtype=None, trust_remote_code=False)
    found = [
        log_likelihoods(requests, skeleton, settings(tmp_path, device), Checked(1, gpu), Silent())
        for device in ("cpu", "cuda")
    ]
    assert found[0] == found[1]
    assert gpu.kernels["gather"]


def test_distances(model: Path, tmp_path: Path, gpu: Record) -> None:
    pruned = prune_here(model, tmp_path / "out", method="magnitude", device="cpu").output
    first, second = (
        compare([model, pruned], settings(tmp_path, device), lambda: Checked(1, gpu), Silent())
        for device in ("cpu", "cuda")
    )
    assert first == second
    assert first[1]["against_first"]["jensen_shannon"] > 0


def test_all_around_the_blocks_goes_to_it(model: Path, tmp_path: Path) -> None:
    """Also what a constructor has computed, and what stands in a vision tower's place."""
    tower = save_wrapper(tmp_path / "llava", "llava")
    for path, some in ((model, "inv_freq"), (tower, "vision_tower")):
        with fake_gpu() as gpu:
            skeleton = open_skeleton(path, dtype=None, trust_remote_code=False)
            ends = skeleton.load_ends(torch.device("cuda"), head=True)
            tensors = dict([*ends.named_parameters(), *ends.named_buffers()])
            devices = {name: each.device.type for name, each in tensors.items() if not each.is_meta}
            assert any(some in name for name in devices)
            assert set(devices.values()) == {"cuda"}, devices
            del ends, tensors, skeleton
        assert gpu.live == 0


def test_a_cpu_is_used_where_it_is_asked_for(model: Path, tmp_path: Path, gpu: Record) -> None:
    prune_here(model, tmp_path / "out", method="wanda", device="cpu")
    assert not gpu.kernels
    assert not gpu.copied
    prune_here(model, tmp_path / "other", method="wanda")
    assert gpu.copied["up"]


def test_a_layer_that_is_saved_with_its_hessian(tmp_path: Path, gpu: Record) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 16, generator=generator)
    weight = torch.randn(8, 16, generator=generator)
    path = tmp_path / "layer.safetensors"
    write_layer_file(
        path, weight=weight, hessian=inputs.T @ inputs, tokens=64, sequences=4, guard=lambda: None
    )
    errors = [
        solve_layer(path, SolveConfig(methods="wanda", device=device, threads=1))["wanda"][
            "relative_error"
        ]
        for device in ("cpu", "cuda")
    ]
    assert errors[0] == errors[1]
    assert gpu.kernels


@pytest.mark.parametrize("lam", [0.3, torch.tensor(0.3), torch.tensor([0.1, 0.3, 0.5])])
def test_a_strength_on_the_cpu(gpu: Record, lam: Any) -> None:
    z = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    found = prox_operator(z.to("cuda"), lam)
    assert torch.equal(found.cpu(), prox_operator(z, lam))


def test_the_operator_in_plain_torch_operations(gpu: Record) -> None:
    z = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    found = prox_operator(z.to("cuda"), 0.3, kernels="torch")
    assert not gpu.launches
    torch.testing.assert_close(found.cpu(), prox_operator(z, 0.3), rtol=1e-5, atol=1e-5)


def test_a_layer_without_inputs(gpu: Record) -> None:
    sums = Accumulator(16, "full", torch.device("cuda"))
    sums.add(torch.zeros(2, 8, 16, device="cuda"), sequences=2)
    solver = solver_for(SolverSettings())
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to("cuda")
    solution = solver.solve(weight, solver.prepare(sums.statistics()))
    assert solution.report.dead_inputs == 16
    assert solution.weight.is_cuda
    check_no_cpu(gpu)


def test_masks_that_were_taken_before_the_model_went_to_the_gpu(gpu: Record) -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False)).requires_grad_(False)
    weight = model[0].weight
    weight[:, ::2] = 0
    keep = KeepMask(model)
    model.to("cuda")
    assert model[0].weight is weight
    weight.add_(1.0)
    keep.on_optimizer_step(None, None, None)
    assert holds(Pattern.parse("2:4"), weight)
    assert weight[:, 1::2].all()


def test_products_and_blocks_are_timed_on_it(model: Path, gpu: Record) -> None:
    def seconds(work: Callable[[], Any]) -> float:
        result = work()
        tensor = result[0] if isinstance(result, tuple) else result
        assert tensor.is_cuda
        return 1.0

    at = Machine("fake", torch.device("cuda"), seconds, torch.clone, lambda: 1e12)
    (measured,) = measure_products(
        [Product(("a",), 16, 32)], (1, 4), torch.float16, at, lambda _: None
    )
    assert measured.problem is None
    assert [each.batch for each in measured.times] == [1, 4]
    shape = read_shape(model, seqlen=8)
    (whole,) = measure_model(model, shape, [Workload(2, 8)], "bfloat16", False, at, lambda _: None)
    assert whole.problem is None
    assert whole.dense == whole.sparse == 1 + 2
