"""What a failing GPU, its memory and NCCL do to a job: lost workers, or errors with their remedy.

There is no GPU here: the errors are torch's own classes with the words of CUDA and NCCL, raised in
real workers in the middle of a phase.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.network import choose_backend
from pipeline.runtime import nvidia
from pipeline.runtime.device import check_given_gpus
from pipeline.runtime.device_errors import explained, explaining, fault_of, in_short
from pipeline.statistics.accumulate import Accumulator
from pipeline.statistics.all_reduce import Collective
from pipeline.worker import local_executor
from storage.errors import (
    ConfigError,
    DeviceFaultError,
    Prox24Error,
    ResourceError,
    WorkerLostError,
)
from tests.support.faults import DEVICE_ERRORS, Fault
from tests.support.jobs import contents, prune_here, write_text
from tests.support.ray_jobs import OPTIONS, STORE_BYTES, RayJob, ray_cluster, undisturbed
from tests.support.tiny_models import save_tiny_model

WORDS = {
    "memory": [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
        "NCCL error in: x.cpp:1, unhandled cuda error\nFailed to CUDA malloc: out of memory",
    ],
    "device": [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: unspecified launch failure",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",
    ],
    "collective": [
        "NCCL error in: x.cpp:1, invalid usage\nncclInvalidUsage: Duplicate GPU detected : rank 1",
        "NCCL error in: x.cpp:1\nError while creating shared memory segment /dev/shm/nccl-x",
        "Distributed package doesn't have NCCL built in",
    ],
    "peer": [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer",
        "NCCL communicator was aborted on rank 0",
        "[Rank 1] Watchdog caught collective operation timeout: NCCL WorkNCCL(SeqNum=3) ran 600 s",
    ],
}


@pytest.mark.parametrize(("fault", "text"), [(f, t) for f, texts in WORDS.items() for t in texts])
def test_the_words_of_libraries(fault: str, text: str) -> None:
    assert fault_of(RuntimeError(text)) == fault


def test_errors_of_other_kinds() -> None:
    assert fault_of(DEVICE_ERRORS["GPU"]) == "device"
    assert fault_of(DEVICE_ERRORS["GPU memory"]) == fault_of(MemoryError()) == "memory"
    assert fault_of(DEVICE_ERRORS["NCCL"]) == "collective"
    assert fault_of(DEVICE_ERRORS["NCCL peer"]) == "peer"
    assert fault_of(torch.AcceleratorError("CUDA error: out of memory")) == "memory"
    for error in (RuntimeError("shapes do not fit"), ValueError("CUDA error"), TypeError("gloo")):
        assert fault_of(error) is None


def test_sizes_stay_in_the_message_and_the_remedy_is_of_the_device() -> None:
    error = DEVICE_ERRORS["GPU memory"]
    assert in_short(error).endswith("79.11 GiB of which 3.52 GiB is free")
    on_gpu = str(explained(error, "solve", 7, "cuda"))
    assert (
        "block 7, phase solve: out of memory (CUDA out of memory. Tried to allocate 20.00" in on_gpu
    )
    assert "--hessian-memory" in on_gpu
    assert "fewer workers" not in on_gpu
    assert "fewer workers" in str(explained(MemoryError(), "solve", 7, "cpu"))
    with (
        pytest.raises(
            DeviceFaultError, match=r"block 3, phase solve: the GPU of node .* ECC error"
        ),
        explaining("solve", 3, torch.device("cpu")),
    ):
        raise DEVICE_ERRORS["GPU"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (DEVICE_ERRORS["GPU memory"], torch.OutOfMemoryError),
        (DEVICE_ERRORS["GPU"], torch.AcceleratorError),
        (DEVICE_ERRORS["NCCL"], ResourceError),
        (DEVICE_ERRORS["NCCL peer"], WorkerLostError),
        (RuntimeError("Connection closed by peer, says gloo"), WorkerLostError),
    ],
)
def test_a_collective_takes_not_every_error_for_a_lost_peer(
    error: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("torch.distributed.all_to_all_single", fail)
    monkeypatch.setattr("torch.distributed.all_reduce", fail)
    collective = Collective.__new__(Collective)
    collective.rank, collective.world, collective.backend, collective.sent = 0, 2, "gloo", 0
    sums = Accumulator(8, "full", torch.device("cpu"))
    sums.add(torch.randn(3, 8), 1)
    for call in (
        lambda: collective.sum(torch.zeros(4)),
        lambda: collective.sum_statistics(sums.sums),
    ):
        with pytest.raises(expected) as caught:
            call()
        if expected is ResourceError:
            assert "--collective gloo" in str(caught.value)


def test_one_worker_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("something was sent")

    monkeypatch.setattr("torch.distributed.all_to_all_single", fail)
    monkeypatch.setattr("torch.distributed.all_reduce", fail)
    collective = Collective.__new__(Collective)
    collective.rank, collective.world, collective.backend, collective.sent = 0, 1, "nccl", 0
    total = Accumulator(8, "full", torch.device("cpu"))
    total.add(torch.randn(30, 8), 2)
    assert collective.sum_statistics(total.sums) is total.sums
    tensor = torch.randn(5)
    assert collective.sum(tensor) is tensor
    assert collective.sent == 0


@pytest.mark.parametrize(
    ("devices", "gpus", "wanted", "backend"),
    [
        (["cuda", "cuda"], 1.0, "auto", "nccl"),
        (["cuda", "cuda"], 1.0, "gloo", "gloo"),
        (["cuda", "cuda"], 0.5, "auto", "gloo"),
        (["cuda"], 1.0, "auto", "gloo"),
        (["cpu", "cpu"], 0.0, "auto", "gloo"),
    ],
)
def test_the_backend(devices: list[str], gpus: float, wanted: str, backend: str) -> None:
    assert choose_backend(devices, gpus, wanted) == backend


def test_nccl_where_it_cannot_work() -> None:
    for devices, gpus in ((["cpu", "cpu"], 0.0), (["cuda", "cuda"], 0.5)):
        with pytest.raises(ConfigError, match="--collective nccl needs a GPU of its own"):
            choose_backend(devices, gpus, "nccl")


def test_a_gpu_that_torch_does_not_find(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27\n")
    monkeypatch.setattr(nvidia, "DRIVER_FILE", version)
    with pytest.raises(ResourceError) as caught:
        check_given_gpus(["0"], None, "10.0.0.7")
    for part in ("node 10.0.0.7", "GPU 0", torch.__version__, "driver 470.82.01", "--device cpu"):
        assert part in str(caught.value)
    check_given_gpus([], None, "n")
    check_given_gpus(["0"], "cpu", "n")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_given_gpus(["0"], None, "n")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ray_cluster(2) as cluster:
        yield str(cluster.address)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("gpus")
    model, text = save_tiny_model(folder / "model", "llama"), write_text(folder / "text.txt")
    return model, text, undisturbed(model, text, folder / "whole")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_gpu_is_a_lost_worker(
    source: tuple[Path, Path, dict[str, bytes]], address: str, tmp_path: Path, workers: int
) -> None:
    """Also of one worker: its process is replaced, the block redone, with the same bytes."""
    fault = Fault("solve", "solver", block=1, rank=workers - 1, what="GPU")
    model, text, expected = source
    job = RayJob(tmp_path / "job", model, text, address, [fault], workers=workers)
    job.folder.mkdir(exist_ok=True)
    job.run()
    assert contents(job.output) == expected
    (struck,) = job.plan.struck(fault)
    after = [p for p in job.plan.phases() if p["time"] > struck["time"]]
    assert struck["pid"] not in {phase["pid"] for phase in after if phase["phase"] == "solve"}
    (retry,) = job.retries()
    assert "the GPU of node" in retry
    assert "ECC" in retry


def test_memory_that_fails_is_not_tried_again(
    source: tuple[Path, Path, dict[str, bytes]], address: str, tmp_path: Path
) -> None:
    """It would only fail again. That of NCCL: test_a_collective_takes_not_every_error."""
    fault = Fault("solve", "solver", block=1, rank=0, what="GPU memory")
    model, text, _ = source
    job = RayJob(tmp_path / "job", model, text, address, [fault])
    job.folder.mkdir(exist_ok=True)
    with pytest.raises(ResourceError) as caught:
        job.run()
    assert "Tried to allocate 20.00 GiB. GPU 0 has" in str(caught.value)
    assert job.retries() == []


def test_in_process_a_failed_gpu_ends_the_job(
    source: tuple[Path, Path, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no other process to go on with; the same command goes on from what is committed."""
    model, text, expected = source
    options = OPTIONS | {"dataset": str(text)}
    perform: Callable[..., Any] = local_executor.BlockWorker.perform

    def failing(worker: Any, phase: Any) -> Any:
        if phase.phase == "solve" and phase.block == 1:
            raise DeviceFaultError("block 1, phase solve: the GPU of node n failed (ECC)")
        return perform(worker, phase)

    monkeypatch.setattr(local_executor.BlockWorker, "perform", failing)
    with pytest.raises(Prox24Error, match="run the same command again") as caught:
        prune_here(model, tmp_path / "output", **options)
    assert not isinstance(caught.value, WorkerLostError)
    monkeypatch.undo()
    assert contents(prune_here(model, tmp_path / "output", **options).output) == expected


def test_a_job_never_falls_to_the_cpu_of_a_node_with_gpus(
    source: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """Ray says GPU, torch has none: refused with defaults, done with --device cpu."""
    model, text, _ = source

    def prune(output: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cluster", "prune", str(model), str(tmp_path / output)]
        options = ["--dataset", str(text), "--nsamples=4", "--seqlen=32", "--ray-address", address]
        return subprocess.run([*command, *options, *more], capture_output=True, text=True)

    with ray_cluster(0) as cluster:
        cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=STORE_BYTES)
        address = str(cluster.address)
        refused = prune("a")
        assert refused.returncode == 2, refused.stderr
        for part in ("Ray gave this worker GPU 0", "driver", torch.__version__, "--device cpu"):
            assert part in refused.stderr.splitlines()[-1]
        done = prune("b", "--device", "cpu")
        assert done.returncode == 0, done.stderr
