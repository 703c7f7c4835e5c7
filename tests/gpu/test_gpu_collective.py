"""Statistics on two fake GPUs, summed as NCCL does it: from GPU to GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.doctor.sums import sum_over_workers
from pipeline.solvers.kernels.cholesky import invert_, invert_blocks_
from pipeline.statistics.accumulate import Accumulator, Sums, add_in_rank_order
from pipeline.statistics.all_reduce import Collective, host_meeting
from tests.support.fake_gpu import WrongDevice, fake_gpu
from tests.support.processes import CONTEXT

WORLD, COLUMNS, HOST = 2, 24, "127.0.0.1"
# The matrix, the diagonal alone, and an expert's few inputs in place of the matrix.
KINDS = {"full": ("full", False), "diagonal": ("diagonal", False), "kept": ("full", True)}


def own_sums(rank: int, kind: str, device: str) -> Sums:
    """What a rank brings."""
    needs, keep = KINDS[kind]
    sums = Accumulator(COLUMNS, needs, torch.device(device), keep)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(2, 4, COLUMNS, generator=generator).bfloat16()
    sums.add(x.to(device), sequences=2)
    return sums.sums


def join(rank: int, ports: Any, backend: str) -> Collective:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if rank == 0:
        store = host_meeting(HOST)
        ports.put(store.port)
        return Collective(0, WORLD, store, backend, 60)
    return Collective.join(rank, WORLD, HOST, ports.get(), backend, 60)


def sum_on_gpu(rank: int, ports: Any, folder: Path) -> None:
    """Process: sums of each kind; also counts the bytes that left the GPU."""
    with fake_gpu() as gpu:
        group = join(rank, ports, "nccl")
        for kind in KINDS:
            own = own_sums(rank, kind, "cuda")
            gpu.clear()
            total = group.sum_statistics(own).statistics()
            copied = torch.tensor([gpu.copied["down"], gpu.copied["up"]])
            tensors = {"diagonal": total.diagonal, "tokens": torch.tensor(total.tokens)}
            for name in ("hessian", "inputs"):
                if (tensor := getattr(total, name)) is not None:
                    assert tensor.is_cuda
                    tensors[name] = tensor
            on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
            save_file(on_cpu | {"copied": copied}, folder / f"{kind}-{rank}.safetensors")
        group.close()


def invert_on_gpu(rank: int, ports: Any, folder: Path) -> None:
    """Process: an inverse in a team of both; also counts the bytes that left the GPU."""
    with fake_gpu() as gpu:
        group = join(rank, ports, "nccl")
        matrix = (torch.eye(1100) + 0.001).cuda()
        team = group.team((0, 1))
        gpu.clear()
        sound = invert_(matrix, team)
        copied = torch.tensor([gpu.copied["down"], gpu.copied["up"]])
        assert bool(sound)
        save_file({"matrix": matrix.cpu(), "copied": copied}, folder / f"{rank}.safetensors")
        group.close()


def test_an_inverse_is_sent_from_gpu_to_gpu(tmp_path: Path) -> None:
    ports = CONTEXT.Queue()
    ranks: list[Any] = [
        CONTEXT.Process(target=invert_on_gpu, args=(rank, ports, tmp_path)) for rank in range(WORLD)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(120)
        assert each.exitcode == 0
    expected = torch.eye(1100) + 0.001
    assert invert_blocks_(expected)
    for rank in range(WORLD):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert torch.equal(found["matrix"], expected)
        assert found["copied"].tolist() == [0, 0]


def test_sums_go_from_gpu_to_gpu(tmp_path: Path) -> None:
    ports = CONTEXT.Queue()
    ranks: list[Any] = [
        CONTEXT.Process(target=sum_on_gpu, args=(rank, ports, tmp_path)) for rank in range(WORLD)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(120)
        assert each.exitcode == 0
    for kind in KINDS:
        expected = add_in_rank_order([own_sums(rank, kind, "cpu") for rank in range(WORLD)])
        statistics = expected.statistics()
        for rank in range(WORLD):
            found = load_file(tmp_path / f"{kind}-{rank}.safetensors")
            assert int(found["tokens"]) == statistics.tokens == 8 * WORLD
            for name in ("diagonal", "hessian", "inputs"):
                tensor = getattr(statistics, name)
                assert (tensor is None) == (name not in found)
                assert tensor is None or torch.equal(found[name], tensor)
            # Only counts of tokens and sequences pass through the host's memory.
            assert found["copied"].max() < 200


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_each_backend_is_given_tensors_that_it_can_send(backend: str) -> None:
    with fake_gpu():
        group = Collective(0, 1, host_meeting(HOST), backend, 60)
        try:
            for device in ("cpu", "cuda"):
                values = torch.ones(4, device=device)
                if (device == "cuda") == (backend == "nccl"):
                    torch.distributed.all_reduce(values)
                    assert values.tolist() == [1, 1, 1, 1]
                else:
                    with pytest.raises(WrongDevice):
                        torch.distributed.all_reduce(values)
            total = group.sum_statistics(own_sums(0, "full", "cuda"))
            assert total.matrix.is_cuda
        finally:
            group.close()


def test_the_sum_of_the_doctor_is_one_of_gpus() -> None:
    with fake_gpu() as gpu:
        found = sum_over_workers(0, 1, HOST, 0, "nccl", "cuda", 60.0)
        assert (found["error"], gpu.collective) == (None, "nccl")
        assert found["alone_seconds"] > 0
        assert not gpu.on_cpu
