"""Whole jobs on the fake GPU, each compared with the same job on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.models.skeleton import open_skeleton
from tests.support.counted import ON_RESPONSES, cut_turns
from tests.support.fake_gpu.jobs import (
    TINY,
    prune_on_gpu,
    relative_errors,
    same_masks,
)
from tests.support.jobs import contents, prune_here, tensors
from tests.support.moe_models import save_moe

TinyModel = Callable[..., Path]
# Regularized so that rounding, which another order of sums changes, is not amplified.
STEADY: dict[str, Any] = {"damping": 0.1, "shrinkage": "0"}
FEW_STEPS = {"prox_growth": 1.2}  # of `prox`: else it takes 700
FEW_ITERATIONS = {"admm_iterations": 12, "admm_first_iterations": 6}


def small(tiny_model: TinyModel, **options: Any) -> Path:
    """Two blocks in bf16, as published models are."""
    return tiny_model("llama", hidden=16, intermediate=32, dtype=torch.bfloat16, **options)


def on_cpu(model: Path, output: Path, **options: Any) -> Path:
    """The same job on the CPU."""
    return prune_here(model, output, device="cpu", **(TINY | options)).output


# Their arithmetic is the same on both devices, in the same order.
SAME_BYTES: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "magnitude, unstructured": {"method": "magnitude", "pattern": "unstructured:0.5"},
    "wanda": {"method": "wanda"},
    "wanda 4:8": {"method": "wanda", "pattern": "4:8"},
    "wanda, cg": {"method": "wanda", "refine": "cg", **STEADY},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt 4:8": {"method": "sparsegpt", "pattern": "4:8"},
    "sparsegpt, unstructured": {"method": "sparsegpt", "pattern": "unstructured:0.5"},
    "prox": {"method": "prox", "gpu_products": "float32", **FEW_STEPS},
}


@pytest.mark.parametrize("name", SAME_BYTES)
def test_the_bytes_of_the_cpu(tiny_model: TinyModel, tmp_path: Path, name: str) -> None:
    model = small(tiny_model)
    job = prune_on_gpu(model, tmp_path / "gpu", **SAME_BYTES[name])
    expected = dict(tensors(on_cpu(model, tmp_path / "cpu", **SAME_BYTES[name])))
    for tensor_name, tensor in tensors(job.output):
        assert torch.equal(tensor, expected[tensor_name]), tensor_name


def test_some_tokens_count(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = small(tiny_model)
    options = {"method": "sparsegpt", "nsamples": 8, "cut": cut_turns, **ON_RESPONSES}
    job = prune_on_gpu(model, tmp_path / "gpu", **options)
    expected = dict(tensors(on_cpu(model, tmp_path / "cpu", **options)))
    for tensor_name, tensor in tensors(job.output):
        assert torch.equal(tensor, expected[tensor_name]), tensor_name


# Inverses are computed in another way on a GPU, and ADMM's step is not one pass. In so small layers
# one entry of a mask is much: products are not rounded, but in the first.
EXACT = {"gpu_products": "float32"}
CLOSE: dict[str, dict[str, Any]] = {
    "prox_admm, rounded": {"method": "prox_admm", **STEADY},
    "prox_admm, estimate": {"shrinkage": "estimate", **EXACT},
    "prox_admm 4:8, gradient": {
        "pattern": "4:8", "refine": "gradient", "refine_steps": 5, **STEADY, **FEW_ITERATIONS,
    },
    "prox_admm 1:4, no refinement": {"pattern": "1:4", "refine": "none", **EXACT, **STEADY},
    "auto": {"shrinkage": "auto", **EXACT},
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSE)
def test_the_error_of_the_cpu(tiny_model: TinyModel, tmp_path: Path, name: str) -> None:
    model = small(tiny_model)
    job = prune_on_gpu(model, tmp_path / "gpu", **CLOSE[name])
    cpu = on_cpu(model, tmp_path / "cpu", **CLOSE[name])
    assert job.errors() == pytest.approx(relative_errors(cpu), rel=0.05)
    assert same_masks(job.output, cpu) > 0.95


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_mixture_of_experts(tmp_path: Path, family: str) -> None:
    model = save_moe(tmp_path / "model", family, dtype=torch.bfloat16)
    skeleton = open_skeleton(model, dtype=None, trust_remote_code=False)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    options: dict[str, Any] = {"nsamples": 8, "expert_tokens": 8, "method": "sparsegpt"}
    job = prune_on_gpu(model, tmp_path / "gpu", **options)
    cpu = on_cpu(model, tmp_path / "cpu", **options)
    assert job.errors() == pytest.approx(relative_errors(cpu), rel=1e-3)
    assert same_masks(job.output, cpu) > 0.999


def test_several_passes_over_a_block_give_the_same_bytes(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = small(tiny_model)
    outputs = {}
    for name, more in (("one", {}), ("several", {"hessian_memory": 1e-9})):
        (tmp_path / name).mkdir()
        outputs[name] = prune_on_gpu(model, tmp_path / name / "out", method="sparsegpt", **more)
    assert len(outputs["several"].held) > len(outputs["one"].held)
    assert outputs["several"].gpu.peak < outputs["one"].gpu.peak
    one, several = (dict(tensors(outputs[name].output)) for name in outputs)
    assert all(torch.equal(one[name], several[name]) for name in one)


def test_saved_layers(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = small(tiny_model)
    options = {"method": "wanda", "save_layers": "*.1.*down_proj"}
    prune_on_gpu(model, tmp_path / "gpu", **options)
    on_cpu(model, tmp_path / "cpu", **options)
    (gpu,), (cpu,) = ((tmp_path / f"{name}.run" / "layers").iterdir() for name in ("gpu", "cpu"))
    one, other = load_file(gpu), load_file(cpu)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_float32_forward_uses_no_tf32(tiny_model: TinyModel, tmp_path: Path) -> None:
    job = prune_on_gpu(small(tiny_model), tmp_path / "gpu", method="wanda", dtype="float32")
    assert not [each for each in job.gpu.products if each.tf32]


def test_two_ranks(tiny_model: TinyModel, tmp_path: Path) -> None:
    """As good as on the CPU, and the same bytes each time."""
    model = small(tiny_model)
    jobs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        jobs.append(prune_on_gpu(model, tmp_path / name / "out", workers=2, **STEADY))
    assert contents(jobs[0].output) == contents(jobs[1].output)
    cpu = on_cpu(model, tmp_path / "cpu", workers=2, **STEADY)
    assert jobs[0].errors() == pytest.approx(relative_errors(cpu), rel=0.05)
    assert same_masks(jobs[0].output, cpu) > 0.95
