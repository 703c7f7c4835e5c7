"""The fake GPU itself: it refuses what CUDA refuses, and counts what a GPU would wait for."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.solvers.kernels import prox_operator
from tests.support.fake_gpu import GpuTensor, NotWaited, Record, WrongDevice, fake_gpu
from tests.support.fake_gpu import triton_stub as stub


@pytest.fixture
def gpu() -> Iterator[Record]:
    with fake_gpu() as record:
        yield record


def here() -> Tensor:
    """(3, 4) fp32 on the CPU."""
    return torch.linspace(-1, 1, 12).reshape(3, 4)


# Of x on the GPU and y, its CPU twin: each raises.
REFUSED: dict[str, tuple[type[Exception], Callable[[Tensor, Tensor], Any]]] = {
    "sum of two devices": (WrongDevice, lambda x, y: x + y),
    "product of two devices": (WrongDevice, lambda x, y: x @ y.T),
    "in place": (WrongDevice, lambda x, y: x.add_(y)),
    "into a CPU tensor": (WrongDevice, lambda x, y: torch.mm(x, x.T, out=torch.empty(3, 3))),
    "joined": (WrongDevice, lambda x, y: torch.cat([x, y])),
    "joined numbers": (WrongDevice, lambda x, y: torch.stack([x.sum(), y.sum()])),
    "a number on the GPU": (WrongDevice, lambda x, y: y * x.sum()),
    "added to a CPU number": (WrongDevice, lambda x, y: y.sum().add_(x.sum())),
    "indices on the GPU": (WrongDevice, lambda x, y: y[x > 0]),
    "a weight on the CPU": (WrongDevice, lambda x, y: nn.Linear(4, 2)(x)),
    "attention": (
        WrongDevice,
        lambda x, y: nn.functional.scaled_dot_product_attention(x[None], y[None], x[None]),
    ),
    "numpy": (TypeError, lambda x, y: x.numpy()),
    "numpy by its protocol": (TypeError, lambda x, y: np.asarray(x)),
    "another library": (TypeError, lambda x, y: np.from_dlpack(x)),
    "pickled": (TypeError, lambda x, y: pickle.dumps({"weight": x})),
    "a pickled module": (TypeError, lambda x, y: pickle.dumps(nn.Linear(2, 2).to("cuda"))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(gpu: Record, name: str) -> None:
    error, function = REFUSED[name]
    with pytest.raises(error):
        function(here().to("cuda"), here())


ACCEPTED: dict[str, Callable[[Tensor], Any]] = {
    "a number on the CPU": lambda x: x * torch.tensor(2.0) + 1,
    "made like it": lambda x: torch.ones_like(x) + x.new_zeros(3, 4),
    "made there": lambda x: x + torch.arange(4, device=x.device),
    "from a list": lambda x: x + torch.tensor([1.0, 2, 3, 4], device=x.device),
    "views": lambda x: x[1:, ::2].T.flip(0).contiguous(),
    "set": lambda x: x.index_fill_(0, torch.tensor([1], device=x.device), 2).t(),
    "indexed by a mask": lambda x: x[x > 0],
    "indexed from the CPU": lambda x: x[torch.tensor([0, 2])],
    "written to": lambda x: x.__setitem__((slice(None), 0), 3.0) or x,
    "product": lambda x: torch.mm(x, x.T, out=torch.empty(3, 3, device=x.device)),
    "bits": lambda x: x.view(torch.int32),
    "sorted": lambda x: x.sort(descending=True).values,
    "a module": lambda x: nn.LayerNorm(4).to(x.device)(x),
    "a module and back": lambda x: nn.LayerNorm(4).to(x.device).to("cpu")(x.cpu()),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None]),
    "copied": lambda x: copy.deepcopy(x),
    "through the CPU": lambda x: x.cpu().to(x.device),
    "conditions": lambda x: torch.where(x > 0, x, torch.zeros(())),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_cuda_computes_has_the_bytes_of_the_cpu(gpu: Record, name: str) -> None:
    expected = ACCEPTED[name](here())
    found = ACCEPTED[name](here().to("cuda"))
    assert found.device.type == ("cpu" if name == "a module and back" else "cuda")
    assert torch.equal(found.cpu(), expected)


def test_a_device_by_any_name(gpu: Record) -> None:
    for device in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)):
        for made in (torch.zeros(2, device=device), torch.zeros(2).to(device), nn.Linear(2, 2)):
            moved = made.to(device=device)
            tensor = moved.weight if isinstance(moved, nn.Module) else moved
            assert tensor.is_cuda
            assert tensor.device == torch.device("cuda", 0)
    assert torch.zeros(2).cuda().is_cuda
    assert torch.empty_like(torch.zeros(2, device="cuda"), device="meta").is_meta


# Of x on the GPU: how often the host waits.
WAITS: dict[str, tuple[int, Callable[[Tensor], Any]]] = {
    "a number": (1, lambda x: x.sum().item()),
    "a condition": (1, lambda x: bool((x > 0).all())),
    "an if": (1, lambda x: 1 if x[0, 0] > 0 else 2),
    "to the CPU": (1, lambda x: x.cpu()),
    "into a CPU tensor": (1, lambda x: torch.empty(3, 4).copy_(x)),
    "a list": (1, lambda x: x.tolist()),
    "from a list": (1, lambda x: torch.tensor([1.0], device=x.device)),
    "from the CPU": (1, lambda x: torch.ones(3).to(x.device)),
    "places": (1, lambda x: x.nonzero()),
    "a mask": (1, lambda x: x[x > 0]),
    "a mask written by tensor": (1, lambda x: x.__setitem__(x > 0, x.new_ones(()))),
    "different values": (1, lambda x: torch.unique(x)),
    "equal": (1, lambda x: torch.equal(x, x)),
    "repeated by counts": (
        1,
        lambda x: x[0].repeat_interleave(torch.ones(4, dtype=torch.long, device=x.device)),
    ),
    "a counted histogram": (1, lambda x: torch.bincount(x[0].abs().long(), minlength=4)),
    "checked factor": (1, lambda x: torch.linalg.cholesky(x @ x.T + 3 * torch.eye(3).to("cuda"))),
    "all done": (1, lambda x: torch.cuda.synchronize()),
    "an event": (1, lambda x: torch.cuda.Event().synchronize()),
    "elementwise": (0, lambda x: torch.where(x > 0, x, -x).clamp(min=1).sum(dim=0)),
    "a product": (0, lambda x: x @ x.T),
    "a mask with a number": (0, lambda x: x.__setitem__(x > 0, 1.0)),
    "made of a number": (0, lambda x: torch.full((3,), 2.0, device=x.device)),
    "unchecked factor": (0, lambda x: torch.linalg.cholesky_ex(x[:, :3])),
    "sorting": (0, lambda x: x.topk(2)),
    "pinned, later": (
        0,
        lambda x: torch.ones(3, pin_memory=True).to(x.device, non_blocking=True),
    ),
    "into pinned memory, later": (
        0,
        lambda x: torch.empty(3, 4, pin_memory=True).copy_(x, non_blocking=True),
    ),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_counted(gpu: Record, name: str) -> None:
    count, function = WAITS[name]
    x = here().to("cuda")
    gpu.clear()
    function(x)
    # `cholesky` here also copies a matrix to the GPU.
    assert gpu.waits_of() == count + (name == "checked factor"), gpu.waits


def pinned() -> Tensor:
    """(12,) fp32 of ones."""
    return torch.ones(12, pin_memory=True)


def test_a_copy_that_does_not_block_is_done_when_it_must_be(gpu: Record) -> None:
    """Until then its target is NaN, and its source is still to be read."""
    side, source = torch.cuda.Stream(), pinned()
    assert source.is_pinned()
    assert source[3:].view(torch.int32).is_pinned()
    assert not torch.ones(12).is_pinned()
    with torch.cuda.stream(side):
        there = source.to("cuda", non_blocking=True)
    event = side.record_event()
    assert not event.query()
    assert there.inner.isnan().all()
    source.fill_(2)
    event.synchronize()
    assert event.query()
    assert there.inner.tolist() == [2] * 12
    back = torch.zeros(12, pin_memory=True)
    with torch.cuda.stream(side):
        back.copy_(there, non_blocking=True)
    assert back.isnan().all()
    side.synchronize()
    assert back.tolist() == [2] * 12


ORDERED: dict[str, Callable[[Any, Any], Any]] = {
    "an event": lambda side, event: torch.cuda.current_stream().wait_event(event),
    "the event, by itself": lambda side, event: event.wait(),
    "a stream": lambda side, event: torch.cuda.current_stream().wait_stream(side),
    "the host, for an event": lambda side, event: event.synchronize(),
    "the host, for a stream": lambda side, event: side.synchronize(),
    "the host, for all": lambda side, event: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("how", ORDERED)
def test_a_stream_waits_for_another(gpu: Record, how: str) -> None:
    side, default = torch.cuda.Stream(), torch.cuda.current_stream()
    with torch.cuda.stream(side):
        there = pinned().to("cuda", non_blocking=True)
        assert torch.cuda.current_stream().queue is side.queue
    event = side.record_event()
    with pytest.raises(NotWaited, match="has not waited"):
        there + 1
    with pytest.raises(NotWaited):
        torch.ones(12, pin_memory=True).copy_(there, non_blocking=True)
    ORDERED[how](side, event)
    with pytest.raises(NotWaited, match="record_stream"):
        there + 1
    there.record_stream(default)
    assert (there + 1).tolist() == [2] * 12
    # An event is a place in a queue: what comes after it is not waited for.
    with torch.cuda.stream(side):
        there.copy_(pinned(), non_blocking=True)
    event.wait()
    with pytest.raises(NotWaited, match="has not waited"):
        there.sum()


def test_copies_of_a_stream_are_in_order(gpu: Record) -> None:
    side, source = torch.cuda.Stream(), pinned()
    back = torch.zeros(12, pin_memory=True)
    with torch.cuda.stream(side):
        there = torch.zeros(12, device="cuda")
        there.copy_(source, non_blocking=True)
        back.copy_(there, non_blocking=True)
        assert back.isnan().all()
        there.mul_(3)  # comes after both
    assert back.tolist() == [1] * 12
    assert there.inner.tolist() == [3] * 12


def test_a_computation_is_waited_for_by_a_copy(gpu: Record) -> None:
    side, back = torch.cuda.Stream(), torch.zeros(12, pin_memory=True)
    there = torch.ones(12, device="cuda") + 1
    there.record_stream(side)
    with torch.cuda.stream(side), pytest.raises(NotWaited):
        back.copy_(there, non_blocking=True)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        back.copy_(there, non_blocking=True)
    side.synchronize()
    assert back.tolist() == [2] * 12


def test_bytes_are_those_of_tensors_that_are_alive(gpu: Record) -> None:
    x = torch.zeros(1024, device="cuda")
    view = x[:10]
    assert gpu.live == torch.cuda.memory_allocated() == 4096
    y = x + 1
    assert gpu.live == 8192
    del x, y
    assert gpu.live == 4096  # the view
    assert torch.cuda.max_memory_allocated() == 8192
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 4096
    del view
    assert gpu.live == 0
    gpu.clear()
    torch.ones(256).to("cuda").cpu()
    assert gpu.copied == {"up": 1024, "down": 1024}


def test_no_more_bytes_than_it_has() -> None:
    with fake_gpu(total=1 << 20) as gpu:
        x = torch.zeros(1 << 17, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match=r"1\.00 MiB .*512\.00 KiB|1\.00 MiB"):
            torch.cat([x, x])
        assert gpu.live == 1 << 19
        assert torch.cuda.mem_get_info() == (1 << 19, 1 << 20)


def test_tf32_rounds_operands_and_is_recorded(gpu: Record) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 16, generator=generator), torch.randn(16, 8, generator=generator)
    exact = (a.to("cuda") @ b.to("cuda")).cpu()
    assert torch.equal(exact, a @ b)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rounded = (a.to("cuda") @ b.to("cuda")).cpu()
        short = a.bfloat16().float()
        assert torch.equal((short.to("cuda") @ short.T.to("cuda")).cpu(), short @ short.T)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    a_double, b_double = a.double(), b.double()
    error = (rounded - a_double @ b_double).norm() / (a_double @ b_double).norm()
    assert 1e-5 < error < 2**-10
    assert [(each.tf32, each.exact) for each in gpu.products] == [
        (False, True), (True, False), (True, True),
    ]  # fmt: skip
    assert list(gpu.products.values()) == [2 * 8 * 16 * 8] * 2 + [2 * 8 * 16 * 8]


def test_threads_that_are_started_inside_see_it(gpu: Record) -> None:
    made: list[Tensor] = []
    thread = threading.Thread(target=lambda: made.append(torch.ones(3).to("cuda") + 1))
    thread.start()
    thread.join()
    assert made[0].tolist() == [2, 2, 2]


def test_a_kernel_is_launched_with_what_a_gpu_can_read(gpu: Record) -> None:
    z = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    found = prox_operator.prox_operator(z.to("cuda"), 0.5)
    assert torch.equal(found.cpu(), prox_operator.prox_operator(z, 0.5))
    assert gpu.launches == {"prox_triton._operator": 1}
    kernels = prox_operator._triton_kernels()
    with pytest.raises(WrongDevice):
        kernels.prox_triton(z, torch.ones(1), 10, 1e-4)
    with pytest.raises(WrongDevice):
        kernels.prox_triton(z.to("cuda"), torch.ones(1), 10, 1e-4)
    with pytest.raises(NotImplementedError, match="no stand-in"):
        stub._Kernel(lambda source: None, gpu)[(1,)](z.to("cuda"))


def test_nothing_is_left_of_it() -> None:
    before = dict(vars(torch.cuda))
    with fake_gpu() as gpu:
        assert isinstance(torch.zeros(1, device="cuda"), GpuTensor)
        prox_operator.prox_operator(torch.zeros(4, device="cuda"), 1.0)
    assert gpu.live == 0
    assert vars(torch.cuda) == before
    assert not torch.cuda.is_available()
    kernels = [name for name in sys.modules if name.startswith("pipeline.solvers.kernels")]
    assert not [name for name in kernels if name.endswith("_triton")]
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError)):
        torch.zeros(1, device="cuda")
    assert torch.ones(3)[1:].sum() == 2
    thread = threading.Thread(target=lambda: None)
    assert thread.run.__func__ is threading.Thread.run
