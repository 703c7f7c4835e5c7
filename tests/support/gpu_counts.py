"""What the phases of a block do on a GPU, counted at real shapes without data; what a plan says.

The code of a rank (`BlockWorker`) runs on the fake GPU with tensors without data. Files are stood
in for: what is read from them has shapes alone, and what is written is dropped. Bytes of disk and
network, and hashing, are not counted. The first rank has as much to do as any other.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pipeline.config.layers import LayerRules
from pipeline.loop.rank import Rank, call
from pipeline.messages import Job
from pipeline.models import skeleton as models
from pipeline.models.linears import linear_layers
from pipeline.models.load_plan import plan_loading
from pipeline.models.skeleton import Skeleton
from pipeline.planning.parts import file_parts
from pipeline.planning.parts.file_parts import FileParts
from pipeline.planning.parts.phase_parts import Phase
from pipeline.planning.plan import Plan
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.rates import BYTES_PER_ITERATION, Rates
from pipeline.planning.shapes.source import open_source
from pipeline.runtime.split import shard_ranges
from pipeline.statistics import all_reduce
from pipeline.statistics.all_reduce import Collective
from pipeline.worker import block_loader, block_worker, forward, solve_phases
from pipeline.worker.block_worker import BlockWorker
from pipeline.worker.transfer import slice_writer, staging
from storage.files.hashing import StoredFile
from storage.model.files import ModelFiles, TensorEntry, safetensors_dtype, torch_dtype
from storage.model.folder import LocalFolder
from storage.run.checkpoints import BlockRecord, LayerRecord
from tests.support.fake_gpu import GpuTensor, Record, fake_gpu
from tests.support.fake_gpu.without_data import META

# Operators that start no kernel: views, and the copy of a number.
_NONE = ("_unsafe_view", "_local_scalar_dense")
PRECISIONS = ("fp32", "TF32", "16 bits", "fp64", "attention")


@dataclass(frozen=True)
class Counts:
    """What a phase of one rank does.

    kernels: launches, without allocations and views. waits: of the host for the device. up, down:
    bytes copied to the GPU and from it. operations: of matrix products and factorizations, by
    precision. moved: bytes that kernels other than products read and write. peak: the most bytes
    of tensors on the GPU. None for what is not known (to a plan).
    """

    kernels: float
    waits: float | None
    up: float
    down: float
    operations: Mapping[str, float]
    moved: float | None
    peak: float

    def figures(self) -> dict[str, float | None]:
        """All figures by name."""
        return {
            "kernels": self.kernels,
            "waits": self.waits,
            "bytes to the GPU": self.up,
            "bytes from the GPU": self.down,
            **{f"operations, {name}": self.operations.get(name, 0.0) for name in PRECISIONS},
            "bytes moved by kernels": self.moved,
            "peak bytes": self.peak,
        }


def counted(gpu: Record) -> Counts:
    """The record of a phase, as `Counts`."""
    operations: Counter[str] = Counter()
    for product, count in gpu.products.items():
        operations[_precision(product.dtype, product.tf32)] += count
    for dtype, count in gpu.factored.items():
        operations[_precision(dtype, False)] += count
    operations["attention"] = sum(gpu.attention.values())
    kernels = sum(
        count for name, count in gpu.kernels.items() if "empty" not in name and name not in _NONE
    )
    return Counts(
        kernels=kernels + sum(gpu.launches.values()),
        waits=gpu.waits_of(),
        up=gpu.copied["up"],
        down=gpu.copied["down"],
        operations=operations,
        moved=gpu.moved,
        peak=gpu.highest,
    )


def _precision(dtype: torch.dtype, tf32: bool) -> str:
    names = {torch.float32: "TF32" if tf32 else "fp32", torch.float64: "fp64"}
    return names.get(dtype, "16 bits")


# -- a rank without files --------------------------------------------------------------------------


# Of torch.distributed: what a rank sends reaches no one, and what it waits for is not written.
_COLLECTIVE = ("init_process_group", "new_group", "all_to_all_single", "broadcast")


class _Files(ModelFiles):
    """Weight files without data."""

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """See `ModelFiles.read`: shapes alone."""
        entry = self.tensors[name]
        shape = list(entry.shape)
        if rows is not None:
            shape[0] = rows[1] - rows[0]
        return torch.empty(shape, dtype=torch_dtype(entry.dtype), device=META)


class _Shard:
    """An activation shard without data."""

    def __init__(self, rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.rows, self._shape, self._dtype = rows, shape, dtype

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, start: int, stop: int) -> Tensor:
        """See `ActivationShard.read`."""
        return torch.empty((stop - start, *self._shape), dtype=self._dtype, device=META)


def _skeleton(config: Path) -> Skeleton:
    """The model of a config.json, whose weights are read from `_Files`."""
    source = open_source(config, None, False).skeleton
    entries = {
        name: TensorEntry(
            *(name, "model.safetensors", safetensors_dtype(value.dtype), tuple(value.shape)),
            *(0, value.nbytes),
        )
        for name, value in source.model.state_dict().items()
    }
    folder = LocalFolder(config.parent)
    files = _Files(folder, ("model.safetensors",), entries, json.loads(config.read_text()), None)
    files.expected = {"": ""}  # as if the run directory had been read
    plan = plan_loading(source.model, files)
    return Skeleton(source.model, files, source.blocks_path, source.dtype, plan)


def _nothing(*_: Any, **__: Any) -> None:
    """Stands for what touches files."""


@contextlib.contextmanager
def _without_files(skeleton: Skeleton, job: PlannedJob) -> Iterator[None]:
    """Reading and writing files of a run, without them."""
    shape = (job.seqlen, job.shape.hidden)
    sequences = shard_ranges(job.nsamples, job.batch_size)

    def opened(path: Path, **_: Any) -> _Shard:
        start, stop = sequences[int(path.name.split("-")[1].partition(".")[0])]
        return _Shard(stop - start, shape, skeleton.dtype)

    def layer(_: Path, record: BlockRecord, name: str, **__: Any) -> Tensor:
        entry = record.layers[name]
        return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device=META)

    def written(path: Path, *_: Any, **__: Any) -> StoredFile:
        return StoredFile(path.name, "0" * 64, 0)

    def written_shard(path: Path, tensors: Iterable[Tensor], **_: Any) -> StoredFile:
        for _each in tensors:  # each is copied to the host when it is asked for
            pass
        return written(path)

    tokens = torch.zeros((job.nsamples, job.seqlen), dtype=torch.int64)

    def gathered(counts: Tensor) -> None:
        # Tokens and sequences of the ranks, and whether they have kept inputs.
        assert isinstance(counts, GpuTensor)
        rows = torch.zeros(counts.shape, dtype=counts.dtype)
        each = job.nsamples // job.workers
        rows[:, 0], rows[:, 1] = each * job.seqlen, each
        counts.stated = rows

    stands_in = (
        (block_worker, "open_skeleton", lambda *_, **__: skeleton),
        (block_worker, "trial_launch", _nothing),  # its result is looked at
        (models, "_require_loaded", _nothing),  # what is on meta is in host memory here
        (staging, "_absent", lambda _: False),
        (block_loader, "verify_record", _nothing),
        (block_loader, "read_layer", layer),
        (forward, "open_activation_shard", opened),
        (forward, "write_activation_shard", written_shard),
        (forward, "read_tokens", lambda *_, **__: (tokens, None)),
        (forward, "require_owner", _nothing),
        (solve_phases, "require_owner", _nothing),
        (slice_writer, "write_row_slices", written),
        (all_reduce.dist, "all_reduce", gathered),
        (all_reduce, "_ALL_GATHER", _nothing),
        *((all_reduce.dist, name, _nothing) for name in _COLLECTIVE),
    )
    with contextlib.ExitStack() as stack:
        for place, name, value in stands_in:
            stack.enter_context(patch.object(place, name, value))
        yield


def count_phases(config: Path, job: PlannedJob, folder: Path) -> dict[str, Counts]:
    """Phase -> what the rank that has most of it does, figure by figure.

    The phases are those of block 0, and `advance` from there to block 1, which is the same in the
    middle of the model. In `calibrate` a rank finds what it keeps for all blocks.
    config: the model's config.json. folder: an empty one.
    """
    skeleton = _skeleton(config)
    with fake_gpu(data=False, total=int(job.device_memory)) as gpu, _without_files(skeleton, job):
        ranks = [_count_rank(skeleton, job, rank, gpu, folder) for rank in range(job.workers)]
    return {name: _most([counts[name] for counts in ranks]) for name in ranks[0]}


def _count_rank(
    skeleton: Skeleton, job: PlannedJob, rank: int, gpu: Record, folder: Path
) -> dict[str, Counts]:
    work = Job(
        source=str(folder), run_directory=str(folder), tokens_sha256="",
        rules=LayerRules(settings=job.settings), nsamples=job.nsamples, seqlen=job.seqlen,
        batch_size=job.batch_size, dtype=None, device="cuda", threads=1, trust_remote_code=False,
    )  # fmt: skip
    shards = [StoredFile(f"shard-{n:05d}.0.arrow", "", 0) for n in range(len(job.shards))]
    worker = BlockWorker(work, rank, job.workers)
    if job.workers > 1:
        store: Any = None
        worker.collective = Collective(rank, job.workers, store, "nccl", 1.0, job.nodes)
    phases = (
        call(Rank.calibrate, 0, shards, None, 0),
        call(Rank.reduce),
        call(Rank.solve, 0, "0-1", None),
        call(Rank.advance, 0, _record(skeleton, 0), shards, "0-2", None),
    )
    counts = {}
    for phase in phases:
        gpu.clear()
        worker.perform(phase)
        counts[phase.phase] = counted(gpu)
    return counts


def _most(counts: Sequence[Counts]) -> Counts:
    """The largest of each figure."""
    return Counts(
        *(max(getattr(each, field.name) for each in counts) for field in fields(Counts)[:4]),
        operations={
            name: max(each.operations.get(name, 0.0) for each in counts) for name in PRECISIONS
        },
        moved=max(each.moved or 0.0 for each in counts),
        peak=max(each.peak for each in counts),
    )


def _record(skeleton: Skeleton, block: int) -> BlockRecord:
    dtype = safetensors_dtype(skeleton.dtype)
    layers = {
        name: LayerRecord(shape, dtype, (), {})
        for name, shape in linear_layers(skeleton.blocks[block]).items()
    }
    return BlockRecord(block=block, attempt=0, world=1, files=(), layers=layers)


# -- a plan's figures ------------------------------------------------------------------------------

_RATES = {
    "fp32": ("float32", "inverse"),
    "TF32": ("statistics", "tf32"),
    "16 bits": ("bfloat16", "float16"),
    "fp64": ("float64", "factor"),
    "attention": ("attention",),
}
_KNOWN = {field.name for field in fields(Rates)}
_NEVER = 1e300  # a rate at which nothing takes time


def planned(job: PlannedJob) -> dict[str, Counts]:
    """Phase -> what a plan takes it to do, of the first block and of one in the middle."""
    return {
        name: Counts(
            kernels=_seconds(job, name, operator=1.0),
            waits=None,
            up=_seconds(job, name, without=("read ahead", "copy back"), copy=1.0),
            down=_seconds(job, name, only="copy back", copy=1.0),
            operations={
                precision: _seconds(job, name, **{rate: 1.0 for rate in rates if rate in _KNOWN})
                for precision, rates in _RATES.items()
            },
            moved=_seconds(
                job, name, without=_PRODUCTS, memory=1.0, iteration=1 / BYTES_PER_ITERATION
            ),
            peak=_phases(job)[name].peak.device,
        )
        for name in _phases(job)
    }


# Parts of a solve whose bytes are those of operands of products.
_PRODUCTS = ("products", "products of iterations", "objective")
# Parts whose seconds no rate changes.
_SECONDS = ("inverse, steps",)


def _phases(job: PlannedJob) -> dict[str, Phase]:
    """The phases of the first block, and `advance` of the second."""
    plan = Plan(job)
    first, second = plan.blocks[0].phases, plan.blocks[1].phases
    return {phase.name: phase for phase in (*second, *first)}


@contextlib.contextmanager
def _one_after_another() -> Iterator[None]:
    """Plans in which no file and no copy is moved beside another, or beside the computation."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(file_parts, "SHARDS_ON_GPU", 1))
        stack.enter_context(
            patch.object(file_parts, "in_lanes", lambda disk, rest, _: [disk, *rest])
        )
        hide = patch.object(FileParts, "hide", lambda _, read, written, *__: [*read, *written])
        stack.enter_context(hide)
        yield


def _seconds(
    job: PlannedJob, phase: str, without: Sequence[str] = (), only: str = "", **rates: float
) -> float:
    """The seconds of a phase where only these rates count: so many are done at a rate of 1.

    without, only: parts of the phase, by name.
    """
    fixed = ("name", "measured", "device_memory", "host_bytes", "device_bytes")
    zero = ("operator", "sync", "dispatch", "start")
    none = {
        field.name: 0.0 if field.name in zero else _NEVER
        for field in fields(Rates)
        if field.name not in fixed
    }
    counting = replace(job, rates=replace(job.rates, **(none | rates)))
    with _one_after_another():
        parts = _phases(counting)[phase].parts
    without = (*without, *_SECONDS)
    total = sum(p.seconds for p in parts if p.what not in without and only in ("", p.what))
    return total if total > 1e-6 else 0.0
