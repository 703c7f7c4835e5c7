"""What a plan says of files and copies: lanes that share a disk, row slices, memory on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.planning.parts.file_parts import FileParts, in_lanes
from pipeline.planning.parts.phase_parts import DISK, HASH, LATENCY, PhasePart
from pipeline.planning.plan import Plan
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.rates import gpu_rates
from pipeline.planning.shapes.model import ModelShape, read_shape
from pipeline.worker.transfer import slice_writer
from pipeline.worker.transfer.staging import PINNED_BYTES
from tests.planning.test_plan_counts import config_only, job_of
from tests.support.fake_gpu.jobs import prune_on_gpu

TinyModel = Callable[..., Path]


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """A model whose blocks are 0.4 GB."""
    path = config_only(
        tmp_path_factory.mktemp("config"), blocks=3, hidden=4096, intermediate=11008,
        num_attention_heads=32, positions=4096,
    )  # fmt: skip
    return read_shape(path, seqlen=1024)


def on_gpus(shape: ModelShape, workers: int, **options: Any) -> PlannedJob:
    job = job_of(shape, rates=gpu_rates("H100"), nsamples=128, batch_size=4, workers=workers)
    return replace(job, device_memory=80e9, **options)


def parts_of(plan: Plan, phase: str) -> dict[tuple[str, str], float]:
    """(what, limit) -> seconds of the first phase of that name."""
    found = next(each for _, _, each in plan.phases() if each.name == phase)
    return {(part.what, part.limit): part.seconds for part in found.parts}


def turns(disk: float, rest: float, lanes: int, files: int) -> float:
    """Files of equal size, dealt to lanes: each takes the disk alone, then the rest by itself."""
    free, disk_free = [0.0] * lanes, 0.0
    for _ in range(files):
        lane = free.index(min(free))
        disk_free = max(disk_free, free[lane]) + disk / files
        free[lane] = disk_free + rest / files
    return max(free)


@given(
    disk=st.floats(0.01, 10), hashed=st.floats(0.01, 10), sync=st.floats(0.0, 1),
    lanes=st.integers(1, 8),
)  # fmt: skip
def test_lanes_take_turns(disk: float, hashed: float, sync: float, lanes: int) -> None:
    rest = [PhasePart("hash", HASH, hashed), PhasePart("sync", LATENCY, sync)]
    found = in_lanes(PhasePart("write", DISK, disk), rest, lanes)
    assert [part.what for part in found] == ["write", "hash", "sync"]
    assert found[0].seconds == disk
    total = sum(part.seconds for part in found)
    assert total == pytest.approx(turns(disk, hashed + sync, lanes, 64 * lanes), rel=0.15)


@pytest.mark.parametrize("workers", [1, 2, 8, 64])
def test_slices_are_verified_by_as_many_threads_as_there_are_files(
    shape: ModelShape, workers: int
) -> None:
    job = on_gpus(shape, workers)
    sizes = FileParts(job).slices(shape.kinds[0])
    assert len(sizes) == workers
    assert sum(sizes) == 2 * shape.kinds[0].pruned
    files = sum(-(-int(size) // slice_writer.FILE_BYTES) for size in sizes)
    seconds = parts_of(Plan(job), "advance")["verify slices", HASH]
    largest = min(max(sizes), slice_writer.FILE_BYTES)
    assert seconds == pytest.approx(max(sum(sizes) / min(8, files), largest) / job.rates.hash)


def test_on_a_cpu_they_are_those_of_the_worker(shape: ModelShape) -> None:
    one, four = (
        parts_of(Plan(job_of(shape, workers=8, threads=threads)), "advance") for threads in (1, 4)
    )
    assert one["verify slices", HASH] == pytest.approx(4 * four["verify slices", HASH])
    assert one["hash store", HASH] == four["hash store", HASH] > 0


def test_a_pruned_layer_is_read_once(shape: ModelShape) -> None:
    """As row slices, and not from the weight files too."""
    job, kind = on_gpus(shape, 8), shape.kinds[0]
    found = next(each for _, _, each in Plan(job).phases() if each.name == "advance")
    store = 128 * 1024 * 4096 * 2
    assert found.read == store + 2 * kind.parameters
    parts = parts_of(Plan(job), "advance")
    assert parts["load slices", DISK] == 2 * kind.pruned / job.rates.disk_read
    dense = 2 * (kind.parameters - kind.pruned)
    assert parts["load weights", DISK] == pytest.approx(dense / job.rates.disk_read)


def test_weight_files_are_hashed_side_by_side(shape: ModelShape) -> None:
    many = replace(shape, files=(100, 500, 200, 300, 100))
    for workers, busiest, longest in ((1, 1200, 500), (2, 600, 500), (5, 500, 500)):
        job = on_gpus(many, workers)
        assert sum(job.busiest_files) == busiest
        assert FileParts(job).longest_lane() == longest
    one = job_of(many, threads=1)
    assert FileParts(one).longest_lane() == 1200
    assert FileParts(replace(one, threads=2)).longest_lane() == 600


def test_what_a_gpu_worker_pins_is_counted(shape: ModelShape) -> None:
    gpu, cpu = Plan(on_gpus(shape, 2)), Plan(job_of(shape, workers=2))
    moving = {"embed", "calibrate", "advance", "reduce", "solve"}
    assert moving <= {phase.name for _, _, phase in gpu.phases()}
    for _, _, phase in gpu.phases():
        if phase.name in moving:
            assert phase.peak.host >= PINNED_BYTES, phase.name
    for _, _, phase in cpu.phases():
        if phase.name == "reduce":
            assert phase.peak.host == 0


def test_what_waits_on_a_gpu_is_counted(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Batches that were read ahead, and copies to be written: more than with a single shard."""
    model = tiny_model("llama", blocks=3, hidden=64, intermediate=32, dtype=torch.bfloat16)
    shape = read_shape(model, seqlen=64)
    peaks, planned = [], []
    for shards in (1, 6):
        options = {"batch_size": 4, "nsamples": 4 * shards, "method": "wanda"}
        (tmp_path / f"{shards}").mkdir()
        job = prune_on_gpu(model, tmp_path / f"{shards}" / "out", seqlen=64, **options)
        peaks.append(job.gpu.peak)
        plan = Plan(replace(job_of(shape, rates=gpu_rates("H100"), **options), device_memory=80e9))
        planned.append(max(phase.peak.device for _, _, phase in plan.phases()))
    batch = 4 * 64 * 64 * 2
    assert planned[1] - planned[0] == 4 * batch
    assert batch <= peaks[1] - peaks[0] <= 4 * batch
