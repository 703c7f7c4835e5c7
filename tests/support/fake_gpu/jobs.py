"""Whole jobs on the fake GPU, in this process, checked between phases as Ray and a GPU would."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.loop.rank import Call, Rank
from pipeline.messages import Outcome
from pipeline.worker.local_executor import LocalExecutor
from tests.support.fake_gpu.cuda import fake_gpu
from tests.support.fake_gpu.record import Product, Record
from tests.support.jobs import prune_here, tensors

# Two blocks, two activation shards: what happens more than once happens twice.
TINY: dict[str, Any] = {"nsamples": 4, "seqlen": 16, "batch_size": 2}
# This project's forward passes: mixtures of experts.
FORWARD = "pipeline/models/"
# Where products of float64 are meant: the objective, and SparseGPT's factor.
FLOAT64 = (
    "pipeline/solvers/objective.py",
    "pipeline/solvers/hessian.py",
    "pipeline/solvers/kernels/cholesky.py",
)
# Solvers compute on the GPU; the host counts masks.
ON_CPU = ("pipeline/solvers/mask_counts.py", "pipeline/solvers/kernels/trial_triton.py")
# Where fp32 products may be those of TF32: of inputs that it represents exactly.
TF32 = ("pipeline/statistics/accumulate.py",)
# Where they are always those of TF32, which rounds: iterations of a solve. All else is refinement,
# the report, and what a method computes once.
ROUNDED = {
    ("pipeline/solvers/inverse.py", "DenseInverse.multiply"),
    ("pipeline/solvers/inverse.py", "LowRankInverse.multiply"),
    ("pipeline/solvers/methods/prox.py", "gradient_of"),
}


class Checked(LocalExecutor):
    """Ranks on the fake GPU. What goes to a rank or comes from it is pickled, as Ray does it.

    held: bytes on the GPU after each block's solve.
    """

    def __init__(self, world: int, gpu: Record) -> None:
        super().__init__(world, 1)
        self._gpu = gpu
        self.held: list[int] = []

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        calls = pickle.loads(pickle.dumps(list(calls)))
        outcomes: list[Outcome[Any]] = pickle.loads(pickle.dumps(super().run(calls)))
        if calls[0].phase == Rank.solve.__name__:
            self.held.append(self._gpu.live)
        return outcomes


@dataclass(frozen=True)
class OnGpu:
    """A finished job. output: its folder. gpu: what happened. held: see `Checked`."""

    output: Path
    gpu: Record
    held: list[int]

    def errors(self) -> list[float]:
        """Each layer's relative error, in per cent."""
        return relative_errors(self.output)


def relative_errors(output: Path) -> list[float]:
    """Each layer's relative error in per cent, as the output states it, in its order."""
    layers = json.loads((output / "prox24.json").read_text())["layers"]
    return [entry["relative_error"] for entry in layers]


def prune_on_gpu(model: Path, output: Path, **options: Any) -> OnGpu:
    """A job on the fake GPU; `options` are those of `PruneConfig`.

    Checks what holds for every job: every product has the precision that is meant, solvers compute
    nothing on the CPU, blocks leave no more on the GPU than the first one did, and in the end
    nothing is left.
    """
    with fake_gpu() as gpu:
        executor = Checked(options.get("workers", 1), gpu)
        prune_here(model, output, executor=executor, device="cuda", **(TINY | options))
        rounded = options.get("gpu_products", "tf32") == "tf32"
        check_products(gpu, options.get("dtype"), rounded)
        check_no_cpu(gpu)
        assert gpu.copied["up"]
        assert gpu.copied["down"]
    assert gpu.live == 0, f"{gpu.live} bytes are left on the GPU"
    assert len(set(executor.held[1:])) <= 1, f"after each block's solve: {executor.held}"
    return OnGpu(output, gpu, executor.held)


def check_products(gpu: Record, dtype: str | None, rounded: bool = True) -> None:
    """Every matrix product has a precision that is meant where it is; TF32 is off in the end.

    dtype: of the forward passes, by name; None: of any floating type. In this project's own code
    fp32 is the rule. rounded: whether the iterations' products are TF32.
    """
    bad = [each for each in gpu.products if not _is_meant(each, dtype, rounded)]
    assert not bad, "\n".join(map(str, bad))
    assert not torch.backends.cuda.matmul.allow_tf32, "TF32 is still allowed after the solve"


def in_iterations(product: Product) -> bool:
    """Whether a product is one of a solve's iterations."""
    return (product.place.rpartition(":")[0], product.function) in ROUNDED


def check_no_cpu(gpu: Record) -> None:
    """No solver made or used a CPU tensor, even one that it then only reads a number from."""
    places = [place for place in gpu.on_cpu if place.startswith("pipeline/solvers/")]
    assert not [place for place in places if not place.startswith(ON_CPU)]


def _is_meant(product: Product, dtype: str | None, rounded: bool) -> bool:
    file = product.place.rpartition(":")[0]
    if in_iterations(product):
        return product.dtype == torch.float32 and product.tf32 == rounded
    if not product.exact or (product.tf32 and file not in TF32):
        return False
    if file.startswith("pipeline/") and not file.startswith(FORWARD):
        return product.dtype == torch.float32 or (
            product.dtype == torch.float64 and file in FLOAT64
        )
    return dtype is None or product.dtype in (getattr(torch, dtype), torch.float32)


def same_masks(one: Path, other: Path) -> float:
    """Share of the entries of all tensors that are zero in both models or in none."""
    second: dict[str, Tensor] = dict(tensors(other))
    agreeing = total = 0
    for name, tensor in tensors(one):
        agreeing += int(((tensor != 0) == (second[name] != 0)).sum())
        total += tensor.numel()
    return agreeing / total
