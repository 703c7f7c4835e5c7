"""SparseGPT's lazy block: time of one layer over B = d^a, and the exponent in d for each a.

"A Tighter Complexity Analysis of SparseGPT" bounds the time by
O(d^w + d^(2+a+o(1)) + d^(1+w(1,1,a)-a)) for B = d^a: the second term is the work inside blocks,
the third the products between them. Measured here: the column loop alone (`solve`), on square
layers of random weights, the factor being the same for every B. The best B of every width is
what `--blocksize auto` should take; `auto_blocksize` is the rule made of it.
Times on one CPU thread are processor time, so that other work on the machine does not count;
on more threads or a GPU they are wall time.

    python benchmarks/lazy_update.py --widths 512 1024 2048 --threads 1
    python benchmarks/lazy_update.py --widths 1024 2048 4096 8192 --device cuda
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config.solver import SolverSettings
from pipeline.runtime.threads import set_threads, threads
from pipeline.solvers.methods.sparsegpt import auto_blocksize
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import Statistics

GROUP = 4


def problem(width: int, rows: int, device: torch.device) -> tuple[torch.Tensor, Statistics]:
    """A weight (rows, width) and second moments of 2 * width correlated inputs."""
    generator = torch.Generator().manual_seed(width)
    inputs = torch.randn(2 * width, width, generator=generator)
    inputs += torch.randn(2 * width, 32, generator=generator) @ torch.randn(
        32, width, generator=generator
    )
    inputs = inputs.to(device)
    statistics = Statistics(columns=width, tokens=2 * width, sequences=2, hessian=inputs.T @ inputs)
    return torch.randn(rows, width, generator=generator).to(device), statistics


def clock(device: torch.device) -> float:
    """Seconds of processor time on one CPU thread, else of wall time."""
    if device.type == "cpu" and threads() == 1:
        return time.process_time()
    return time.perf_counter()


def block_of(width: int, exponent: float) -> int:
    """d^a, rounded to whole groups of four."""
    return max(GROUP, round(width**exponent / GROUP) * GROUP)


def measure(
    width: int, exponents: list[float], rows: int, repeats: int, device: torch.device
) -> dict[float, float]:
    """Seconds of the column loop for every exponent, the least of ``repeats``."""
    weight, statistics = problem(width, rows, device)
    prepared = solver_for(SolverSettings(method="sparsegpt")).prepare(statistics)
    best: dict[float, float] = {}
    for _ in range(repeats):
        for exponent in exponents:
            settings = SolverSettings(method="sparsegpt", blocksize=block_of(width, exponent))
            solver = solver_for(settings)
            began = clock(device)
            solver._find(weight, prepared)  # without the report's objectives
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[exponent] = min(best.get(exponent, float("inf")), clock(device) - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument(
        "--exponents", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    )
    parser.add_argument("--rows", type=int, help="rows of the layer; unset: as many as columns")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the table there")
    options = parser.parse_args()
    set_threads(options.threads)
    device = torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    print(f"{name or platform.machine()}, {options.threads} threads, torch {torch.__version__}")

    table = {
        width: measure(width, options.exponents, options.rows or width, options.repeats, device)
        for width in options.widths
    }
    print("\nseconds (B)")
    print("a    " + "".join(f"d = {width:<14d}" for width in table) + "exponent in d")
    logs = np.log(np.array(list(table)))
    for exponent in options.exponents:
        times = [table[width][exponent] for width in table]
        cells = "".join(
            f"{seconds:8.3f} ({block_of(width, exponent):4d})   "
            for width, seconds in zip(table, times, strict=True)
        )
        slope = np.polyfit(logs, np.log(times), 1)[0] if len(times) > 1 else float("nan")
        print(f"{exponent:.2f} {cells} {slope:.2f}")
    for width, times in table.items():
        best = min(times, key=lambda exponent: times[exponent])
        ruled = auto_blocksize(width, device.type)
        print(f"d = {width}: best B = {block_of(width, best)}; --blocksize auto takes {ruled}")
    if options.json:
        options.json.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
