"""One very wide layer solved on one GPU: seconds, factorization apart, the operator's share, TF32.

Synthetic: Gaussian weights, inputs with a decaying spectrum and a few loud columns. It measures
time and memory, and what TF32 products of the iterations cost in the final objective; it says
nothing of accuracy on real layers.

    python benchmarks/gpu_solve.py --shapes 8192x8192 8192x28672
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config.solver import GpuProducts, SolverSettings
from pipeline.runtime.device import tf32_products
from pipeline.runtime.stopwatch import device_peak, host_peak, reset_peaks
from pipeline.solvers.kernels.cholesky import invert_
from pipeline.solvers.kernels.prox_operator import prox_operator
from pipeline.solvers.objective import relative_error
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import Statistics
from pipeline.statistics.accumulate import Accumulator


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, the device waited for."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def statistics(columns: int, device: torch.device) -> Statistics:
    """Second moments of 2 C tokens whose covariance decays over a random basis."""
    generator = torch.Generator(device).manual_seed(columns)
    total = Accumulator(columns, "full", device)
    scale = torch.exp(torch.randn(columns, device=device, generator=generator) * 0.7)
    basis = torch.randn(512, columns, device=device, generator=generator) / 16
    for _ in range(-(-2 * columns // 4096)):
        own = torch.randn(4096, columns, device=device, generator=generator)
        shared = torch.randn(4096, 512, device=device, generator=generator) @ basis
        total.add((own + shared) * scale, sequences=2)
    return total.statistics()


def measure(
    rows: int, columns: int, method: str, tf32: bool, device: torch.device
) -> dict[str, object]:
    """One solve of a (rows, columns) layer."""
    sums = statistics(columns, device)
    weight = torch.randn(rows, columns, device=device) * 0.02
    products: GpuProducts = "tf32" if tf32 else "float32"
    solver = solver_for(SolverSettings(method=method, gpu_products=products))
    reset_peaks(device)
    cuda = device.type == "cuda"
    held = torch.cuda.memory_allocated(device) if cuda else host_peak()
    solution = None

    def solve() -> None:
        nonlocal solution
        solution = solver.solve(weight, solver.prepare(sums))

    total = seconds(solve, device)
    peak = (device_peak(device) if cuda else host_peak()) - held
    assert solution is not None
    error = relative_error(solution.weight, weight, sums)
    assert sums.hessian is not None
    buffer = sums.hessian / sums.tokens
    buffer.diagonal().add_(0.1 * buffer.diagonal().mean())
    inverse = seconds(lambda: invert_(buffer), device)
    with tf32_products(tf32):
        product = seconds(lambda: weight @ buffer, device)
    prox_operator(weight, 0.1)
    operator = seconds(lambda: prox_operator(weight, 0.1), device)
    return {
        "rows": rows,
        "columns": columns,
        "method": method,
        "tf32": tf32,
        "seconds": total,
        "relative_error": error,
        "peak_extra_bytes": peak,
        "c_by_c_bytes": 4 * columns * columns,
        "one_inverse_seconds": inverse,
        "one_product_seconds": product,
        "one_operator_seconds": operator,
        "iterations": solution.report.iterations,
    }


def main() -> None:
    """Prints one JSON line per solve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["8192x8192", "8192x28672"])
    parser.add_argument("--methods", nargs="+", default=["prox_admm"])
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    )
    measure(64, 512, "prox_admm", False, device)  # compiles, and makes the library's handles
    for shape in options.shapes:
        rows, columns = map(int, shape.split("x"))
        for method in options.methods:
            for tf32 in (False, True) if device.type == "cuda" else (False,):
                print(json.dumps(measure(rows, columns, method, tf32, device)), flush=True)


if __name__ == "__main__":
    main()
