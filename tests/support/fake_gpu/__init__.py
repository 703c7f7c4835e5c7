"""One CUDA device on a CPU build of torch, for tests: no GPU, no driver, no compiler.

    with fake_gpu() as gpu:
        x = torch.ones(3, device="cuda")      # x.device is cuda:0; it computes on the CPU
        x + torch.ones(3)                     # raises, as CUDA does: tensors on two devices
        bool(x.any()); print(gpu.waits)       # where the host waited for the device

A tensor on it is a wrapper (`tensor.GpuTensor`) around a CPU tensor. Each operator is compared with
what CUDA would accept, counted, and run on the CPU, so results have the bytes of the CPU wherever
the code takes the same path. `record.Record` says what is counted.

Copies that do not block are done as late as CUDA may do them, and a stream that uses what another
has written must have waited: see `streams`.

What it cannot show: cuBLAS's order of additions, kernels that race, NCCL, a fragmented allocator,
time. Kernels in Triton are not run: `triton_stub` has stand-ins for them.
"""

from tests.support.fake_gpu.cuda import fake_gpu
from tests.support.fake_gpu.record import Record
from tests.support.fake_gpu.streams import NotWaited
from tests.support.fake_gpu.tensor import GpuTensor, WrongDevice

__all__ = ["GpuTensor", "NotWaited", "Record", "WrongDevice", "fake_gpu"]
