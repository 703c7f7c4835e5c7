"""Reconstruction on the fake GPU: what a rank keeps is there, and nothing is left.

torch's engine looks for a real device as soon as it goes backward. So a forward's result stands for
the gradients here; on a CPU they are tested in tests/reconstruct.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.reconstruct.gradients import Run, relative_error
from pipeline.worker.training import rank_training
from tests.support.fake_gpu.jobs import TINY, prune_on_gpu
from tests.support.jobs import prune_here, tensors
from tests.support.moe_models import save_moe

TinyModel = Callable[..., Path]
JOBS: dict[str, dict[str, Any]] = {
    "one worker": {},
    "two workers": {"workers": 2},
    "exchange": {"reconstruct_mask": "exchange", "reconstruct_lr": 0.05},
    "dense block": {"reconstruct_target": "dense-block"},
    "float16": {"dtype": "float16"},
}
OPTIONS: dict[str, Any] = {"reconstruct": "block", "reconstruct_epochs": 2, "method": "wanda"}


@pytest.fixture(autouse=True)
def no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(
        run: Run, weights: Sequence[Tensor], inputs: Tensor, target: Tensor, counted: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            loss = relative_error(run(inputs), target, counted)
            return loss, [(weight.detach() * loss).to(weight.dtype) for weight in weights]

    monkeypatch.setattr(rank_training, "gradients", stand_in)


@pytest.mark.parametrize("name", JOBS)
def test_the_weights_of_the_cpu(tiny_model: TinyModel, tmp_path: Path, name: str) -> None:
    model = tiny_model("llama", hidden=16, intermediate=32, dtype=torch.bfloat16)
    options = OPTIONS | JOBS[name]
    job = prune_on_gpu(model, tmp_path / "gpu", **options)
    cpu = prune_here(model, tmp_path / "cpu", device="cpu", **(TINY | options)).output
    expected = dict(tensors(cpu))
    for tensor_name, tensor in tensors(job.output):
        torch.testing.assert_close(tensor, expected[tensor_name], rtol=0.05, atol=1e-3)


def test_a_mixture(tmp_path: Path) -> None:
    model = save_moe(tmp_path / "moe", "mixtral", dtype=torch.bfloat16)
    prune_on_gpu(model, tmp_path / "gpu", **OPTIONS, expert_tokens=4)
