"""Measures the rates of this machine at the shapes of a model, in about a minute.

One process per worker measures, all at the same time, since workers share memory and caches in a
job too. Where possible the code of a job is timed: the forward of a block with random weights, the
sums of statistics, the inverse, short solves.

With one thread, compute is timed in processor time, so that other work on the machine does not
count.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from pipeline.config.solver import SolverSettings
from pipeline.models.forward_capture import BlockCall
from pipeline.planning.counts import hessian_flops, solve_counts
from pipeline.planning.rates import Rates, cpu_rates, with_threads
from pipeline.planning.shapes.model import BlockShape, ModelShape, read_shape
from pipeline.planning.shapes.source import example_block
from pipeline.runtime.products import product
from pipeline.runtime.threads import in_pieces, row_pieces, set_threads
from pipeline.solvers.cost import objective_share
from pipeline.solvers.kernels.cholesky import invert_, sweep_operations, upper_factor_
from pipeline.solvers.objective import objective
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import Statistics
from pipeline.statistics.accumulate import Accumulator
from storage.errors import ResourceError
from storage.files.commit import sha256_file, write_new_file
from storage.model.files import ModelFiles, fingerprint_weight_file
from storage.model.safetensors_format import header_for, tensor_bytes
from storage.object_store import Place, location, place

# Bytes, measured, that a Ray worker takes in addition to this process: Ray, channels and buffers.
RAY_WORKER_BYTES = 80 * 2**20
# Freed memory that the allocator keeps: 0 to 180 MiB were measured. It differs between workers,
# since each thread has its arena, and allocations below 32 MiB are not returned to the system.
KEPT_BYTES = 96 * 2**20
_FILE_BYTES = 64 * 2**20
# With more operations than this, a forward or a part of a solve is measured on fewer rows.
_MOST_OPERATIONS = 2e11
_MOST_COLUMNS = 4096
_ADMM_ITERATIONS = 12


def measure_rates(
    model: Place, shape: ModelShape, *, batch_size: int, workers: int, threads: int, folder: Path
) -> Rates:
    """Rates of one of `workers` workers with `threads` threads each, while all of them are busy.

    folder: where each process writes a file of 64 MiB, on the filesystem that a job would use.
    Raises `ResourceError` where a measuring process fails.
    """
    arguments = [location(model), str(batch_size), str(shape.seqlen), shape.dtype, str(workers)]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "pipeline.planning.measure_rates",
                *arguments,
                str(threads),
                path,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        for path in [str(folder)] * workers
    ]
    measured = []
    for process in processes:
        output, errors = process.communicate()
        if process.returncode:
            last = (errors.strip().splitlines() or ["no message"])[-1]
            raise ResourceError(f"--calibrate: a measuring process failed: {last}")
        measured.append(json.loads(output.strip().splitlines()[-1]))
    rates: Rates = with_threads(cpu_rates(), threads)
    changes: dict[str, Any] = {**_combined(measured), "measured": True}
    return replace(rates, **changes)


def _combined(measured: list[dict[str, float]]) -> dict[str, float]:
    """Means over the processes; sums for the rates of the disk, which they share."""
    count = len(measured)
    combined = {name: sum(rates[name] for rates in measured) / count for name in measured[0]}
    for name in ("disk_read", "disk_write"):
        combined[name] *= count
    return combined


def measure(model: Place, shape: ModelShape, batch_size: int, workers: int, threads: int) -> Rates:
    """Compute rates of this process, which is one of `workers` measuring processes."""
    set_threads(threads)
    base = with_threads(cpu_rates(), threads)
    reached = [block for block in range(len(shape.blocks)) if block not in shape.passed_by]
    kind = shape.kind(reached[len(reached) // 2])
    clock = time.process_time if threads == 1 else time.perf_counter
    host_bytes = psutil.Process().memory_info().rss + RAY_WORKER_BYTES + KEPT_BYTES
    measured: dict[str, Any] = {"host_bytes": host_bytes}
    measured |= _forward(model, shape, kind, batch_size, clock, base)
    measured |= _solving(shape, kind, workers, clock)
    rates = replace(base, **measured)
    operator = _operator(shape, kind, workers, clock, rates)
    return replace(rates, operator=operator, start=base.start)


Clock = Callable[[], float]


def _seconds(work: Callable[[], object], clock: Clock, repeats: int = 3) -> float:
    """The shortest time of a few runs, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        began = clock()
        work()
        times.append(clock() - began)
    return max(min(times), 1e-7)


@torch.no_grad()
def _forward(
    model: Place,
    shape: ModelShape,
    kind: BlockShape,
    batch_size: int,
    clock: Clock,
    base: Rates,
) -> dict[str, float]:
    """Rates of a block's forward: products, statistics, attention and memory."""
    dtype = getattr(torch, shape.dtype)
    profile = kind.full
    whole = profile.products + profile.attention
    size = max(1, min(batch_size, int(_MOST_OPERATIONS / max(whole, 1.0))))
    length = shape.seqlen if whole <= _MOST_OPERATIONS else 128
    measured: dict[str, float] = {}
    tokens = size * length
    seconds, flops, summed, adding = 0.0, 0.0, 0.0, 0.0
    for group, count in Counter(kind.groups).items():
        seen = max(1, round(tokens * group.share))
        inputs = torch.randn(seen, group.columns).to(dtype)
        for _, rows, columns in group.layers:
            weight = torch.randn(rows, columns).to(dtype)
            one = _seconds(lambda: product(inputs, weight.T), clock)  # noqa: B023
            seconds += count * one
            flops += count * 2.0 * seen * rows * columns
        total = Accumulator(group.columns, "full", torch.device("cpu"))
        adding += count * _seconds(lambda: total.add(inputs, 1), clock, 2)  # noqa: B023
        summed += count * hessian_flops(seen, group.columns)
    measured[shape.dtype] = flops / seconds
    measured["statistics"] = summed / adding
    if length == shape.seqlen:
        block, call, hidden = example_block(model, shape.dtype, size, shape.seqlen)
        time_of = _seconds(lambda: call.run(block, hidden), clock)
        rate = measured[shape.dtype]
        measured |= _attention_and_memory(block, call, time_of, size, kind, rate, base)
    return measured


def _attention_and_memory(
    block: nn.Module,
    call: BlockCall,
    total: float,
    size: int,
    kind: BlockShape,
    product: float,
    base: Rates,
) -> dict[str, float]:
    """Rates of attention and of elementwise operators, from the time of a forward.

    The time that its products do not take is divided between the two in the proportion that the
    rates `base` predict. total: seconds of the forward. product: rate of its products.
    """
    profile = kind.full
    rest = max(total - size * profile.products / product, 0.05 * total)
    attention = size * profile.attention / base.attention
    moved = size * profile.moved / base.memory
    slower = rest / (attention + moved)
    return {"attention": base.attention / slower, "memory": base.memory / slower}


def _solving(shape: ModelShape, kind: BlockShape, workers: int, clock: Clock) -> dict[str, float]:
    """Rates of the parts of solves, measured at each group's shape, with the rows of one worker."""
    sums: dict[str, list[float]] = {}

    def add(name: str, amount: float, seconds: float) -> None:
        sums.setdefault(name, [0.0, 0.0])
        sums[name][0] += amount
        sums[name][1] += seconds

    for group in {g.columns: g for g in kind.groups if g.columns <= _MOST_COLUMNS}.values():
        rows = max(16, sum(r for _, r, _ in group.layers) // workers)
        rows = min(rows, max(16, int(_MOST_OPERATIONS / (2 * group.columns**2 * 40))))
        for name, (amount, seconds) in _solve_pieces(rows, group.columns, clock).items():
            add(name, amount, seconds)
    return {name: amount / seconds for name, (amount, seconds) in sums.items()}


def _solve_pieces(rows: int, columns: int, clock: Clock) -> dict[str, tuple[float, float]]:
    """Name of a rate -> (amount of work, seconds), for the shape (rows, columns) of a group."""
    statistics, weight = _problem(rows, columns)
    matrix = statistics.hessian
    if matrix is None:
        return {}
    one = 2.0 * rows * columns**2
    single = _seconds(lambda: product(weight, matrix), clock)
    pieces = row_pieces(weight)
    wide = _seconds(
        lambda: in_pieces(lambda p: objective(weight[p] * 0, weight[p], statistics), pieces),
        *(clock, 2),
    )
    damped = matrix / statistics.tokens + torch.eye(columns)
    inverse = _seconds(lambda: invert_(damped.clone()), clock, 2)
    double = damped.double()
    factor = _seconds(lambda: upper_factor_(double.clone()), clock, 2)
    few, many = (
        _seconds(_admm(weight, statistics, n), clock, 2)
        for n in (_ADMM_ITERATIONS, 2 * _ADMM_ITERATIONS)
    )
    left = max(many - few - _ADMM_ITERATIONS * single, 0.02 * many)
    return {
        "float32": (one, single),
        "tf32": (one, single),
        "float64": (one * objective_share(columns), wide),
        "inverse": (sweep_operations(columns, "cpu"), inverse),
        "factor": (float(columns) ** 3, factor),
        "iteration": (_ADMM_ITERATIONS * float(rows) * columns, left),
    }


def _problem(rows: int, columns: int) -> tuple[Statistics, torch.Tensor]:
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    inputs += 0.5 * inputs.roll(1, dims=1)
    total = Accumulator(columns, "full", torch.device("cpu"))
    total.add(inputs, 2)
    return total.statistics(), torch.randn(rows, columns, generator=generator)


def _admm(weight: torch.Tensor, statistics: Statistics, iterations: int) -> Callable[[], object]:
    """A solve with one inverse, in which lambda covers its whole range in few iterations."""
    usual = SolverSettings()
    steps = usual.admm_iterations / iterations
    settings = SolverSettings(
        refine="none",
        damping=0.01,
        admm_iterations=iterations,
        admm_first_iterations=iterations,
        admm_lambda_growth=usual.admm_lambda_growth**steps,
    )
    solver = solver_for(settings)
    return lambda: solver.solve(weight, solver.prepare(statistics))


def _operator(
    shape: ModelShape, kind: BlockShape, workers: int, clock: Clock, rates: Rates
) -> float:
    """Seconds to start an operator: from SparseGPT, the method that starts most.

    It is the time of a solve that the other rates do not explain, divided by the operators.
    """
    group = min(kind.groups, key=lambda g: g.columns)
    rows = max(16, min(sum(r for _, r, _ in group.layers) // workers, 1024))
    if group.columns > _MOST_COLUMNS:
        return rates.operator
    statistics, weight = _problem(rows, group.columns)
    solver = solver_for(SolverSettings(method="sparsegpt"))
    seconds = _seconds(lambda: solver.solve(weight, solver.prepare(statistics)), clock, 2)
    counts = solve_counts(solver.settings, rows, group.columns, 4, "cpu")
    one = 2.0 * rows * group.columns**2
    known = (
        counts.wide * one * objective_share(group.columns) / rates.float64
        + counts.other / rates.float32
        + counts.factor / rates.factor
        + counts.moved / rates.memory
    )
    return max(seconds - known, 0.1 * seconds) / counts.operators


def measure_files(folder: Path) -> dict[str, float]:
    """Rates of the disk, of hashing and of copies, with a file of 64 MiB in `folder`."""
    wall = time.perf_counter
    with tempfile.TemporaryDirectory(prefix=".prox24-calibrate-", dir=folder) as name:
        path = Path(name) / "model.safetensors"
        tensor = torch.randn(_FILE_BYTES // 4)
        raw = tensor_bytes(tensor)
        began = wall()
        with write_new_file(path) as writer:
            writer.write(header_for({"weight": tensor}, {}))
            writer.write(raw)
        written = wall() - began
        hashing = _seconds(lambda: sha256_file(path), time.process_time, 2)
        checking = _seconds(
            lambda: fingerprint_weight_file(path.parent, path.name), time.process_time, 2
        )
        (path.parent / "config.json").write_text("{}")
        files = ModelFiles.open(path.parent)
        # From the page cache, like files that a job has just written.
        reading = _seconds(lambda: files.read("weight"), time.process_time, 2)
        syncs = []
        for number in range(5):
            began = wall()
            with write_new_file(Path(name) / f"{number}") as writer:
                writer.write(b"0")
            syncs.append(wall() - began)
    return {
        "hash": _FILE_BYTES / hashing,
        "check": _FILE_BYTES / checking,
        "copy": _FILE_BYTES / reading,
        "disk_read": _FILE_BYTES / reading,
        "disk_write": _FILE_BYTES / max(written - hashing, 0.1 * written),
        # Both the file and its folder are synced.
        "sync": sorted(syncs)[len(syncs) // 2] / 2,
    }


def main(arguments: list[str]) -> None:
    """One measuring process: prints the rates as one JSON object."""
    model, batch_size, seqlen, dtype, workers, threads, folder = arguments
    shape = read_shape(place(model), seqlen=int(seqlen), dtype=dtype)
    rates = measure(place(model), shape, int(batch_size), int(workers), int(threads))
    measured: dict[str, Any] = {
        f.name: getattr(rates, f.name) for f in fields(Rates) if f.type == "float"
    }
    measured |= measure_files(Path(folder))
    assert all(math.isfinite(value) for value in measured.values())
    print(json.dumps(measured))


if __name__ == "__main__":
    main(sys.argv[1:])
