"""Copies beside the computation, on the fake GPU, which does them as late as CUDA may."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.runtime.background import Background
from pipeline.worker.transfer import staging as module
from pipeline.worker.transfer.staging import BUFFERS, PINNED_BYTES, Staging
from tests.support.fake_gpu import GpuTensor, NotWaited, Record, fake_gpu
from tests.support.fake_gpu.jobs import prune_on_gpu
from tests.support.jobs import contents, prune_here

TinyModel = Callable[..., Path]
PIECE = 64  # bytes


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    """Buffers are small, so that tensors take many pieces and buffers are used again."""
    monkeypatch.setattr(module, "BUFFER_BYTES", PIECE)
    with fake_gpu() as record:
        yield record


def values(rows: int = 50, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(rows, 7) on the CPU, all different."""
    return torch.arange(7 * rows).reshape(rows, 7).to(dtype)


KINDS: dict[str, Callable[[], Tensor]] = {
    "many pieces": values,
    "fp32": lambda: values(9, torch.float32),
    "one piece": lambda: values(2),
    "a number": lambda: torch.tensor(3.0),
    "empty": lambda: torch.empty(0, 7),
    "not contiguous": lambda: values().T[::2],
    "integers": lambda: values(50, torch.int64),
    "conditions": lambda: values() > 9,
}


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(gpu: Record, kind: str) -> None:
    source = KINDS[kind]()
    expected = source.clone()
    staging = Staging(torch.device("cuda", 0))
    there = staging.up(source)
    source.zero_()  # it has been copied, if only into the buffers
    arrived = there.tensor()
    assert (arrived.device.type, arrived.dtype) == ("cuda", expected.dtype)
    leaving = staging.down(arrived)
    arrived.zero_()
    back = leaving.tensor()
    assert (back.device.type, back.dtype) == ("cpu", expected.dtype)
    assert torch.equal(back, expected)


def test_the_host_does_not_wait_for_what_arrives(gpu: Record) -> None:
    staging = Staging(torch.device("cuda", 0))
    gpu.clear()
    arriving = [staging.up(values(4)) for _ in range(BUFFERS)]
    for each in arriving:
        each.tensor().mul_(2)
    assert not gpu.waits, "as many pieces as buffers: none is used again"
    staging.up(values(4))
    assert gpu.waits_of("synchronize") == 1, "and then the first one's copy must be done"


def test_no_more_is_pinned_than_the_buffers(gpu: Record) -> None:
    staging = Staging(torch.device("cuda", 0))
    assert gpu.pinned == 0, "none before the first copy"
    for _ in range(3):
        staging.down(staging.up(values()).tensor()).tensor()
    assert gpu.most_pinned == BUFFERS * PIECE
    del staging
    assert gpu.pinned == 0


def test_many_threads_share_the_buffers(gpu: Record) -> None:
    """More threads than buffers, each with more pieces than there are buffers."""
    staging, background = Staging(torch.device("cuda", 0)), Background(2 * BUFFERS)
    sources = [values(60) + number for number in range(20)]
    for source, there in zip(sources, staging.all_up(sources, background), strict=True):
        assert torch.equal(there.cpu(), source)
    on_gpu = [source.to("cuda") for source in sources]
    leaving = [staging.down(each) for each in on_gpu]
    back = background.ahead(lambda each: each.tensor(), leaving, 2 * BUFFERS)
    assert all(torch.equal(*pair) for pair in zip(back, sources, strict=True))
    assert gpu.most_pinned == BUFFERS * PIECE


class _Tied(nn.Module):
    """Two linears of one weight, a buffer, and a weight without data."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(7, 7), nn.Linear(7, 7, bias=False)
        self.other.weight = self.one.weight
        self.norm = nn.BatchNorm1d(7)
        self.later = nn.Linear(7, 7, bias=False, device="meta")


def test_a_module(gpu: Record) -> None:
    made = _Tied()
    expected = {name: value.clone() for name, value in made.state_dict().items()}
    staging = Staging(torch.device("cuda", 0))
    moved = staging.module_up(made, Background(2))
    assert isinstance(moved, _Tied)
    assert moved.one.weight is moved.other.weight
    assert moved.later.weight.is_meta
    assert not any(parameter.requires_grad for parameter in moved.one.parameters())
    for name, value in moved.state_dict().items():
        if name != "later.weight":
            assert value.is_cuda
            assert torch.equal(value.cpu(), expected[name].cpu()), name


def test_nothing_is_copied_on_a_cpu() -> None:
    staging, source = Staging(torch.device("cpu")), values()
    assert staging.up(source).tensor() is source
    copy = staging.down(source)
    expected = source.clone()
    source.zero_()
    assert torch.equal(copy.tensor(), expected)
    made = _Tied()
    assert staging.module_up(made, Background()) is made


# -- each wait is needed -------------------------------------------------------------------------


def sources() -> list[Tensor]:
    return [values(40) + number for number in range(3)]


def upward(staging: Staging) -> list[Tensor]:
    """Several tensors to the GPU, and one more than the expected there."""
    return [(each.tensor() + 1).cpu() for each in [staging.up(source) for source in sources()]]


def downward(staging: Staging) -> list[Tensor]:
    """The same tensors, computed on the GPU, to the host."""
    on_gpu = [source.to("cuda") for source in sources()]
    return [each.tensor() for each in [staging.down(each + 1) for each in on_gpu]]


def none(*arguments: Any) -> None:
    """In the place of a wait."""


# What is left out: where, class, method.
WAITS: dict[str, tuple[Callable[[Staging], list[Tensor]], str, str]] = {
    "of the computation for a copy": (upward, "Stream", "wait_event"),
    "of a copy for the computation": (downward, "Stream", "wait_event"),
    "for a buffer that is copied to the GPU": (upward, "Event", "synchronize"),
    "for a buffer that is copied from it": (downward, "Event", "synchronize"),
    "for the use of a copy's memory": (upward, "GpuTensor", "record_stream"),
    "for the copy of a result's memory": (downward, "GpuTensor", "record_stream"),
}


def same(found: list[Tensor]) -> bool:
    return all(torch.equal(one, source + 1) for one, source in zip(found, sources(), strict=True))


@pytest.mark.parametrize("name", WAITS)
def test_without_a_wait_the_fake_gpu_notices(
    gpu: Record, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trip, owner, method = WAITS[name]
    staging = Staging(torch.device("cuda", 0))
    assert same(trip(staging))
    kind = GpuTensor if owner == "GpuTensor" else getattr(torch.cuda, owner)
    monkeypatch.setattr(kind, method, none)
    try:
        found = trip(staging)
    except NotWaited:
        return
    assert not same(found)


# -- whole jobs ----------------------------------------------------------------------------------


def small(tiny_model: TinyModel) -> Path:
    return tiny_model("llama", hidden=16, intermediate=32, dtype=torch.bfloat16, blocks=3)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_in_small_pieces_has_the_bytes_of_the_cpu(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Shards of several batches, several of them at a time, and buffers smaller than any."""
    monkeypatch.setattr(module, "BUFFER_BYTES", 96)
    options: dict[str, Any] = {
        "method": "wanda", "nsamples": 20, "batch_size": 1, "workers": workers, "seqlen": 16,
    }  # fmt: skip
    job = prune_on_gpu(small(tiny_model), tmp_path / "gpu", **options)
    assert job.gpu.most_pinned == workers * BUFFERS * 96
    cpu = prune_here(small(tiny_model), tmp_path / "cpu", device="cpu", **options)
    one, other = (
        {name: data for name, data in contents(folder).items() if name.endswith("safetensors")}
        for folder in (job.output, cpu.output)
    )
    assert one == other


def test_a_job_pins_what_the_plan_counts(tiny_model: TinyModel, tmp_path: Path) -> None:
    job = prune_on_gpu(small(tiny_model), tmp_path / "gpu", method="wanda")
    assert 0 < job.gpu.most_pinned <= PINNED_BYTES


def test_a_job_that_does_not_wait_fails(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module._Arriving, "tensor", lambda arriving: arriving.value)
    with pytest.raises(NotWaited):
        prune_on_gpu(small(tiny_model), tmp_path / "gpu", method="wanda")
