"""What a plan counts: operations of a forward and a solve by hand, bytes as a real job writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from pipeline.config.methods import METHODS
from pipeline.config.prune import PruneConfig
from pipeline.config.solver import SolverSettings
from pipeline.loop.rank import Call
from pipeline.planning.counts import (
    hessian_flops,
    reduced_bytes,
    solve_counts,
    statistic_bytes,
    store_bytes,
    summed_bytes,
)
from pipeline.planning.plan import Plan
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.rates import cpu_rates
from pipeline.planning.shapes.model import ModelShape, read_shape
from pipeline.solvers.cost import objective_share
from pipeline.solvers.registry import solver_for
from pipeline.statistics.accumulate import Accumulator
from pipeline.worker.block_worker import Job, Outcome
from pipeline.worker.local_executor import LocalExecutor
from tests.support.jobs import SMALL, prune_here
from tests.support.tiny_models import ARCHITECTURES, tiny_config

TinyModel = Callable[..., Path]
SEQLEN = 32


def _addmm_flops(_: Any, one: Any, other: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * one[0] * one[1] * other[1])


def counting() -> FlopCounterMode:
    """torch's own counter, which leaves products added in place out."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})


def job_of(shape: ModelShape, **options: Any) -> PlannedJob:
    """A job of the tiny kind on CPU workers."""
    settings = SolverSettings(method=options.pop("method", "prox_admm")).resolved()
    usual: dict[str, Any] = {
        "nsamples": 8, "seqlen": shape.seqlen, "batch_size": 2, "workers": 1, "nodes": 1,
        "rates": cpu_rates(),
    }  # fmt: skip
    return PlannedJob(shape=shape, settings=settings, **(usual | options))


def config_only(tmp_path: Path, architecture: str = "llama", **options: Any) -> Path:
    """A config.json without any weights."""
    config = tiny_config(architecture, **options)
    names = {"llama": "LlamaForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
    payload = config.to_dict() | {"architectures": [names[architecture]], "dtype": "bfloat16"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(payload))
    return path


# -- a forward -----------------------------------------------------------------------------------


def test_a_llama_block_counted_by_hand(tmp_path: Path) -> None:
    shape = read_shape(config_only(tmp_path, hidden=32, intermediate=64), seqlen=SEQLEN)
    (kind,) = shape.kinds
    q, kv, mlp = 32 * 32, 16 * 32, 64 * 32
    assert kind.full.products == 2 * SEQLEN * (2 * q + 2 * kv + 3 * mlp)
    # Scores and their product with the values, 4 heads of 8; half of them is masked.
    assert kind.full.attention == 0.5 * 2 * 2 * 4 * SEQLEN * SEQLEN * 8
    # An observed forward ends at the input of down_proj.
    assert kind.full.products - kind.observed.products == 2 * SEQLEN * mlp
    assert kind.observed.operators < kind.full.operators
    assert kind.parameters == 2 * q + 2 * kv + 3 * mlp + 2 * 32
    assert kind.pruned == kind.parameters - 2 * 32
    assert shape.ends == 260 * 32 + 32
    assert shape.head == 260 * 32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_are_those_that_torch_counts(architecture: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(architecture)
    shape = read_shape(folder, seqlen=SEQLEN)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros((1, SEQLEN), dtype=torch.int64))
    counted = sum(shape.kind(block).full.products for block in range(len(shape.blocks)))
    head = 2 * SEQLEN * shape.hidden * shape.vocabulary
    # Eager attention is two products over all scores, the masked ones too.
    attention = sum(shape.kind(block).full.attention for block in range(len(shape.blocks)))
    share = 2 if attention else 0
    assert counted + share * attention + head == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_groups_are_those_of_a_job(
    architecture: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    shape = read_shape(tiny_model(architecture), seqlen=SEQLEN)
    result = prune_here(tiny_model(architecture), tmp_path / "output", method="wanda")
    groups = result.summary["blocks"][0]["groups"]
    assert [[name for name, _, _ in group.layers] for group in shape.kinds[0].groups] == groups


def test_live_bytes_grow_with_the_sequence(tmp_path: Path) -> None:
    path = config_only(tmp_path)
    short, long = (read_shape(path, seqlen=n).kinds[0] for n in (32, 64))
    assert long.full.live == 2 * short.full.live
    # The largest moment holds at least gate, up and their product.
    assert short.full.live >= 3 * 32 * 64 * 2
    assert long.full.moved == pytest.approx(2 * short.full.moved, rel=0.05)


# -- statistics and solves -----------------------------------------------------------------------


@pytest.mark.parametrize("columns", [64, 576, 2304, 4096])
def test_hessian_operations(columns: int) -> None:
    total = Accumulator(columns, "full", torch.device("meta"))
    with counting() as counter:
        total.add(torch.empty(128, columns, device="meta"), 1)
    assert hessian_flops(128, columns) == counter.get_total_flops()


def test_products_of_a_solve_are_those_it_makes() -> None:
    rows, columns = 32, 512
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(1024, columns, generator=torch.Generator().manual_seed(1))
    total = Accumulator(columns, "full", torch.device("cpu"))
    total.add(inputs, 2)
    statistics, share = total.statistics(), objective_share(columns)
    for method in ("prox_admm", "sparsegpt", "wanda"):
        settings = SolverSettings(method=method).resolved()
        solver = solver_for(settings)
        own = statistics if method != "wanda" else replace(statistics, hessian=None)
        with counting() as counter:
            solver.solve(weight, solver.prepare(own))
        counts = solve_counts(settings, rows, columns, 4, "cpu")
        one = 2 * rows * columns**2
        counted = (counts.products + counts.wide * share) * one + counts.other + counts.inverse
        # Parts of a factor are not in torch's count.
        assert 0.95 * counted <= counter.get_total_flops() <= 1.05 * (counted + counts.factor)


def test_bytes_of_a_sum_over_ranks() -> None:
    settings = SolverSettings().resolved()
    full = statistic_bytes(settings, 1024)
    assert 4 * 1024**2 < full < 4.1 * 1024**2
    summed = summed_bytes(settings, 1024)
    assert summed == Accumulator(1024, "full", torch.device("meta")).sums.nbytes
    assert reduced_bytes(summed, 1) == 0
    assert reduced_bytes(summed, 4) == pytest.approx(1.5 * summed)
    assert statistic_bytes(SolverSettings(method="wanda").resolved(), 1024) == 4 * 1024
    assert statistic_bytes(SolverSettings(method="magnitude").resolved(), 1024) == 0
    assert statistic_bytes(settings, 1024, halves=2) == 2 * full


# -- a real job's bytes --------------------------------------------------------------------------


class Measured(LocalExecutor):
    """The local executor; notes what lies on disk after each phase."""

    def __init__(self, world: int) -> None:
        super().__init__(world, 1)
        self.stores: list[int] = []
        self.slices = 0

    def start(self, job: Job) -> None:
        super().start(job)
        self.folder = Path(job.run_directory)

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        outcomes = super().run(calls)
        stores: dict[str, int] = {}
        for path in self.folder.glob("activations/*/*.arrow"):
            with pa.memory_map(str(path)) as source:
                size = pa.ipc.open_file(source).read_all().nbytes
            stores[path.parent.name] = stores.get(path.parent.name, 0) + size
        self.stores += stores.values()
        found = [p.stat().st_size for p in self.folder.glob("checkpoints/*/*.safetensors")]
        self.slices = max(self.slices, sum(found))
        return outcomes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_on_disk_are_those_a_job_writes(
    dtype: torch.dtype, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model("llama", blocks=3, dtype=dtype)
    executor = Measured(2)
    prune_here(folder, tmp_path / "output", workers=2, executor=executor, method="sparsegpt")
    shape = read_shape(folder, seqlen=SMALL["seqlen"])
    store = store_bytes(SMALL["nsamples"], SMALL["seqlen"], shape.hidden, dtype.itemsize)
    assert set(executor.stores) == {store}
    plan = Plan(job_of(shape, workers=2, method="sparsegpt"))
    assert plan.disk_bytes["activations"] == 2 * store
    # Their files' headers name each layer and its rows.
    headers = executor.slices - plan.disk_bytes["checkpoints"]
    assert 0 < headers <= 3 * 2 * 2048
    written = sum(p.stat().st_size for p in (tmp_path / "output").glob("*.safetensors"))
    assert plan.disk_bytes["output"] == written


# -- no weights, and no time ---------------------------------------------------------------------


def test_weights_are_not_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama", weight_files=2)
    whole = read_shape(folder, seqlen=SEQLEN)
    for path in folder.glob("*.safetensors"):
        size = path.stat().st_size
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        with path.open("r+b") as file:  # the data become a hole: zeros that take no disk
            file.truncate(header)
            file.truncate(size)
    assert read_shape(folder, seqlen=SEQLEN) == whole


def test_a_shape_is_the_same_each_time(tiny_model: TinyModel) -> None:
    """What a backward needs is told apart by the address of its memory, which may be used again."""
    folder = tiny_model("llama")
    once = read_shape(folder, seqlen=SEQLEN)
    assert all(read_shape(folder, seqlen=SEQLEN) == once for _ in range(20))


def test_blocks_of_one_structure_are_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.planning.shapes import model as module

    looked: list[object] = []
    real = module.find_groups_on_meta

    def counted(block: Any, *rest: Any) -> Any:
        looked.append(block)
        return real(block, *rest)

    monkeypatch.setattr(module, "find_groups_on_meta", counted)
    shape = read_shape(config_only(tmp_path, blocks=40), seqlen=SEQLEN)
    assert len(shape.blocks) == 40
    assert len(looked) == len(shape.kinds) == 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_counted(method: str) -> None:
    counts = solve_counts(SolverSettings(method=method), 16, 64, 2, "cuda")
    assert counts.operators > 0
    assert counts.moved > 0
    assert PruneConfig(method=method).method == method


def test_experts_are_layers_with_their_share_of_the_tokens(tmp_path: Path) -> None:
    path = config_only(
        tmp_path, "qwen3_moe", hidden=32, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=16, head_dim=8,
    )  # fmt: skip
    shape = read_shape(path, seqlen=SEQLEN)
    assert shape.unsupported is None
    experts = [group for group in shape.kinds[0].groups if group.experts]
    assert [([shape for _, *shape in g.layers], g.share) for g in experts] == 8 * [
        ([[16, 32], [16, 32]], 0.25),
        ([[32, 16]], 0.25),
    ]
    attention = 2 * 32 * 32 + 2 * 16 * 32
    of_experts = 2 * (32 * 32 + 32 * 16)  # two of eight see each token
    router = 8 * 32
    assert shape.kinds[0].full.products == 2 * SEQLEN * (attention + of_experts + router)
    assert Plan(job_of(shape)).seconds > 0
