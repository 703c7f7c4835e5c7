"""A plan's figures against what the code does on a GPU, counted on tensors without data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.layers import LayerRules
from pipeline.planning.options import PlanConfig, planned_job
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.shapes.model import read_shape
from tests.support.fake_gpu import fake_gpu
from tests.support.gpu_counts import Counts, count_phases, planned
from tests.support.tiny_models import tiny_config

# Bytes of a handful of numbers, which a plan leaves out.
_FEW_BYTES = 4096


def job_on_gpus(folder: Path, **options: Any) -> tuple[Path, PlannedJob]:
    """The config.json of a model of a middle size, and its job."""
    config = tiny_config(
        "llama", hidden=1024, intermediate=4096, blocks=3, positions=512, num_attention_heads=16
    )
    payload = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    path = folder / "config.json"
    path.write_text(json.dumps(payload))
    plan = PlanConfig(nsamples=16, seqlen=512, reconstruct="none", **options)
    rules = LayerRules(settings=plan.solver_settings(plan.method))
    return path, planned_job(read_shape(path, seqlen=512, rules=rules), plan)


def departures(found: Counts, plan: Counts) -> dict[str, float]:
    """Figure -> the plan's over the count, where they differ by more than a tenth."""
    wrong = {}
    for name, count in found.figures().items():
        expected = plan.figures()[name]
        if expected is None or max(count or 0.0, expected) <= _few(name):
            continue
        ratio = expected / count if count else float("inf")
        if not 0.9 <= ratio <= 1.1:
            wrong[name] = ratio
    return wrong


def _few(name: str) -> float:
    return _FEW_BYTES if "the GPU" in name else 0.0


Found = tuple[PlannedJob, dict[str, Counts]]


@pytest.fixture(scope="module", params=[("prox_admm", 1), ("prox_admm", 2), ("sparsegpt", 2)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A job on some GPUs, and what its phases do."""
    folder = tmp_path_factory.mktemp("counts")
    method, gpus = request.param
    path, job = job_on_gpus(folder, method=method, gpus=gpus)
    return job, count_phases(path, job, folder)


def test_every_phase_does_what_the_plan_says(found: Found) -> None:
    job, counted = found
    plan = planned(job)
    assert list(counted) == ["calibrate", "reduce", "solve", "advance"]
    wrong = {name: departures(counts, plan[name]) for name, counts in counted.items()}
    assert not any(wrong.values()), wrong


def test_figures_by_hand(found: Found) -> None:
    """Rows, columns and tokens are all there are."""
    job, counted = found
    tokens, hidden, wide, kv = 16 * 512 // job.workers, 1024, 4096, 1024 // 16 * 2
    weights = 2 * hidden * hidden + 2 * kv * hidden + 3 * wide * hidden
    advance = counted["advance"]
    # Through the pruned block, and through the next one but for down_proj.
    assert advance.operations["16 bits"] == 2 * tokens * (2 * weights - wide * hidden)
    norms = 2 * hidden
    assert advance.up == 2 * (2 * (weights + norms) + tokens * hidden)
    # What is written; the flag of each batch is read apart.
    assert 0 <= advance.down - 2 * tokens * hidden < _FEW_BYTES
    assert 2 * weights / job.workers <= counted["solve"].up < 2 * weights + job.workers


def test_memory_and_time_do_not_grow_with_the_shapes() -> None:
    """A product that would take 4 TB and days."""
    with fake_gpu(data=False, total=1 << 50) as gpu, torch.no_grad():
        one = torch.empty(1 << 20, 1 << 20, device="cuda")
        product = one @ one
        assert gpu.highest == 8 << 40
        assert bool(torch.isfinite(product).all())
        assert not bool((product < 0).any())
        assert sum(gpu.products.values()) == 2 << 60
        assert gpu.waits_of() == 2
