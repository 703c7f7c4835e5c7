"""Time of solves over the number of columns C, and the fitted exponent.

With fixed rows the parts are apart: a product is R C^2, an inverse (prox_admm takes two) and
SparseGPT's factor are C^3. `--rows-per-column 0.5` takes rows as real layers have them. "budget"
is the time of 150 products and one Cholesky factor with its inverse by the library: what
prox_admm, refinement and preparation included, is to stay within. Synthetic inputs; times only.
Times on one CPU thread are processor time, so that other work on the machine does not count;
on more threads or a GPU they are wall time.

    python benchmarks/scaling.py --columns 512 1024 2048 4096 --rows 256
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config.solver import SolverSettings
from pipeline.runtime.threads import set_threads, threads
from pipeline.solvers.kernels.cholesky import invert_
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import Statistics


def clock(device: torch.device) -> float:
    """Seconds of processor time on one CPU thread, else of wall time."""
    if device.type == "cpu" and threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of ``work``, the device waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = clock(device)
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock(device) - began


def measure(columns: int, rows: int, methods: list[str], device: torch.device) -> dict[str, float]:
    """Seconds of one product, one factorization, and a whole solve of every method, and the share
    of its budget that prox_admm takes. The least of several runs where they are short."""
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    inputs += inputs.roll(1, dims=1)
    weight = torch.randn(rows, columns, generator=generator).to(device)
    inputs = inputs.to(device)
    statistics = Statistics(
        columns=columns, tokens=2 * columns, sequences=2, hessian=inputs.T @ inputs
    )
    damped = statistics.hessian / statistics.tokens
    damped.diagonal().add_(0.1)
    repeats = 3 if rows * columns**2 < 2e9 else 2

    def least(work: Callable[[], object], times: int) -> float:
        return min(seconds(work, device) for _ in range(times))

    def products() -> None:
        for _ in range(run):
            torch.mm(weight, damped, out=result)

    # As many in a row as take about as long as a solve, so that both meet the same disturbance.
    run = max(1, min(150, int(2e10 / (rows * columns**2))))
    result = torch.empty_like(weight)
    times = {"product": least(products, repeats) / run}
    times["factorization"] = least(
        lambda: torch.cholesky_inverse(torch.linalg.cholesky(damped)), repeats
    )
    times["inverse"] = least(lambda: invert_(damped.clone()), repeats)
    for method in methods:
        solver = solver_for(SolverSettings(method=method))
        times[method] = least(lambda: solver.solve(weight, solver.prepare(statistics)), repeats)  # noqa: B023
    times["product"] = min(times["product"], least(products, repeats) / run)
    times["budget"] = 150 * times["product"] + times["factorization"]
    if "prox_admm" in times:
        times["share"] = times["prox_admm"] / times["budget"]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--columns", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rows-per-column", type=float, help="rows as a share of the columns")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt", "prox_admm"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the table there")
    options = parser.parse_args()
    set_threads(options.threads)
    device = torch.device(options.device)
    measure(256, 16, options.methods, device)  # compile and start libraries
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    table = {}
    for columns in options.columns:
        rows = options.rows
        if options.rows_per_column:
            rows = int(options.rows_per_column * columns)
        table[columns] = measure(columns, rows, options.methods, device)
        cells = "  ".join(f"{name} {value:.4g}" for name, value in table[columns].items())
        print(f"R = {rows:6d}  C = {columns:6d}  {cells}", flush=True)
    if len(table) > 1:
        logs = np.log(np.array(list(table)))
        for name in table[options.columns[0]]:
            times = np.log([table[columns][name] for columns in table])
            print(f"{name}: C^{np.polyfit(logs, times, 1)[0]:.2f}")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
