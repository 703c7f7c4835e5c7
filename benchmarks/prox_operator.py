"""Time of the proximal operator: on a CPU against torch.sort, on a GPU against a copy.

    python benchmarks/prox_operator.py                        # one thread, float32
    python benchmarks/prox_operator.py --device cuda          # GB/s, read and written
    python benchmarks/prox_operator.py --device cuda --sweep  # also programs of other sizes

Input is normal random. Everything that is compared is timed in turn in one run, and the minimum
over the repetitions is printed, because other work on the machine only ever adds time.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.runtime.threads import set_threads, threads
from pipeline.solvers.kernels import prox_operator as prox

LAMBDAS = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 3.0, 10.0)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def seconds(work: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    work()
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def minima(works: list[Callable[[], object]], device: str, repetitions: int) -> list[float]:
    """The least time of each, all of them in turn each repetition; the first is thrown away."""
    best = [float("inf")] * len(works)
    for repetition in range(repetitions + 1):
        for index, work in enumerate(works):
            taken = seconds(work, device)
            if repetition:
                best[index] = min(best[index], taken)
    return best


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    widest = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({widest}), {threads()} thread(s)"


def on_cpu(z: Tensor, repetitions: int) -> None:
    groups = z.numel() // 4
    print("| λ | kernel, ns/group | torch.sort, ns/group | ratio |")
    print("|---|---|---|---|")
    for lam in LAMBDAS:
        kernel, sort = minima(
            [
                lambda lam=lam: prox.prox_operator(z, lam),
                lambda: torch.sort(z.view(-1, 4), dim=-1),
            ],
            "cpu",
            repetitions,
        )
        print(
            f"| {lam:g} | {1e9 * kernel / groups:.1f} | {1e9 * sort / groups:.1f} "
            f"| {kernel / sort:.2f} |",
            flush=True,
        )


def on_gpu(z: Tensor, repetitions: int, sweep: bool) -> None:
    gigabytes = 2 * z.numel() * z.element_size() / 1e9
    compute = torch.float64 if z.dtype == torch.float64 else torch.float32
    settings = (prox.NEWTON_STEPS[compute], prox.NEWTON_TOLERANCE[compute])
    sizes = [(b, w) for b in (32, 64, 128, 256) for w in (1, 2, 4) if b >= 32 * w] if sweep else []
    kernels = prox._triton_kernels()
    print("| λ | operator, GB/s | copy, GB/s | share |" + "".join(f" {b}/{w} |" for b, w in sizes))
    print("|---" * (4 + len(sizes)) + "|")
    target = torch.empty_like(z)
    for lam in LAMBDAS:
        value = torch.tensor([lam], dtype=compute, device=z.device)
        works: list[Callable[[], object]] = [
            lambda lam=lam: prox.prox_operator(z, lam),
            lambda: target.copy_(z),
        ]
        for block, warps in sizes:
            works.append(
                lambda value=value, block=block, warps=warps: kernels.prox_triton(
                    z, value, *settings, block=block, warps=warps
                )
            )
        operator, copy, *others = (gigabytes / t for t in minima(works, "cuda", repetitions))
        print(
            f"| {lam:g} | {operator:.0f} | {copy:.0f} | {operator / copy:.2f} |"
            + "".join(f" {rate / copy:.2f} |" for rate in others),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the proximal operator.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--rows", type=int, help="default 2048, on a GPU 8192")
    parser.add_argument("--columns", type=int, help="default 4096, on a GPU 28672")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="other program sizes (GPU)")
    arguments = parser.parse_args()
    gpu = arguments.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("no CUDA device")
    set_threads(arguments.threads)
    rows = arguments.rows or (8192 if gpu else 2048)
    columns = arguments.columns or (28672 if gpu else 4096)
    generator = torch.Generator(arguments.device).manual_seed(0)
    z = torch.randn(rows, columns, generator=generator, device=arguments.device)
    z = z.to(DTYPES[arguments.dtype])
    print(
        f"{hardware(arguments.device)}; torch {torch.__version__}; {arguments.dtype} "
        f"{rows} × {columns}; {datetime.date.today().isoformat()}\n"
    )
    if gpu:
        on_gpu(z, arguments.repetitions, arguments.sweep)
    else:
        on_cpu(z, arguments.repetitions)


if __name__ == "__main__":
    main()
