"""All methods on the same layers: objective, held-out error, time, memory; a table and a plot.

Layers: the files of ``--golden`` (``weight``, ``inputs``) and four synthetic shapes whose inputs
have a decaying spectrum, a few loud columns and correlated tokens. Solved on all inputs at the
method's defaults, and, for the held-out column, on the first half of the sequences and judged on
the second. Everything is timed in one run; figures are comparable within it.
Times on one CPU thread are processor time, so that other work on the machine does not count;
on more threads or a GPU they are wall time.
Peak memory is what the process grew by, which on small layers may be nothing.

    python benchmarks/solvers.py --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config.solver import SolverSettings
from pipeline.runtime.stopwatch import device_peak, host_peak, reset_peaks
from pipeline.runtime.threads import set_threads, threads
from pipeline.solvers.auto_shrinkage import choose_regularization
from pipeline.solvers.objective import relative_error
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import Statistics

ROOT = Path(__file__).resolve().parent.parent
# Label -> settings. Damping 0.01 without shrinkage is what the papers use.
RUNS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "wanda+gradient": {"method": "wanda", "refine": "gradient", "damping": 0.01},
    "wanda+cg": {"method": "wanda", "refine": "cg", "refine_steps": 30, "damping": 0.01},
    "sparsegpt": {"method": "sparsegpt"},
    "sparsegpt+gradient": {"method": "sparsegpt", "refine": "gradient"},
    "sparsegpt+cg": {"method": "sparsegpt", "refine": "cg", "refine_steps": 30},
    "prox, none": {"method": "prox", "refine": "none"},
    "prox+cg": {"method": "prox"},
    "prox_admm, none, 0.01": {"method": "prox_admm", "damping": 0.01, "refine": "none"},
    "prox_admm+cg, 0.01": {"method": "prox_admm", "damping": 0.01},
    "prox_admm+cg (default)": {"method": "prox_admm"},
    "prox_admm+cg (auto)": {"method": "prox_admm", "shrinkage": "auto"},
}
# The two settings of each method that the plot joins: (label without, label with refinement).
CURVES = {
    "magnitude": ["magnitude"],
    "wanda": ["wanda", "wanda+cg", "wanda+gradient"],
    "sparsegpt": ["sparsegpt", "sparsegpt+cg", "sparsegpt+gradient"],
    "prox": ["prox, none", "prox+cg"],
    "prox_admm": ["prox_admm, none, 0.01", "prox_admm+cg, 0.01"],
}
SHAPES = ((256, 256), (768, 768), (2048, 512), (512, 2048))


def clock(device: torch.device) -> float:
    """Seconds of processor time on one CPU thread, else of wall time."""
    if device.type == "cpu" and threads() == 1:
        return time.process_time()
    return time.perf_counter()


def synthetic(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weight (R, C) and inputs (4, 512, C): low-rank part, decaying noise, loud columns."""
    generator = torch.Generator().manual_seed(rows * 10_000 + columns)
    basis = torch.randn(columns // 4, columns, generator=generator) / columns**0.5
    scale = torch.exp(0.6 * torch.randn(columns, generator=generator))
    scale[:: columns // 4] *= 10
    common = torch.randn(4, 512, columns // 4, generator=generator)
    common = common + 0.7 * common.roll(1, dims=1)
    inputs = (2 * common @ basis + torch.randn(4, 512, columns, generator=generator) * 0.5) * scale
    return torch.randn(rows, columns, generator=generator) * 0.03, inputs


def sums(inputs: Tensor) -> Statistics:
    """Statistics of inputs (sequences, tokens, C)."""
    x = inputs.reshape(-1, inputs.shape[-1]).float()
    return Statistics(columns=x.shape[1], tokens=len(x), sequences=len(inputs), hessian=x.T @ x)


def solve(weight: Tensor, inputs: Tensor, options: dict[str, Any]) -> tuple[Tensor, float, int]:
    """Pruned weight, seconds with all that belongs to the solve, and peak bytes beside H."""
    statistics = sums(inputs)
    settings = SolverSettings(**options)
    halves = None
    if settings.shrinkage == "auto":
        dim = 0 if len(inputs) > 1 else 1
        first, second = inputs.tensor_split(2, dim=dim)
        halves = (sums(first), sums(second))
    device = weight.device
    reset_peaks(device)
    held = device_peak(device) if device.type == "cuda" else host_peak()
    began = clock(device)
    if halves is not None:
        choice = choose_regularization({"layer": weight}, halves, settings)
        options = {**options, "damping": choice.damping, "shrinkage": choice.shrinkage}
    solver = solver_for(SolverSettings(**options))
    solution = solver.solve(weight, solver.prepare(statistics))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = clock(device) - began
    peak = device_peak(device) if device.type == "cuda" else host_peak()
    return solution.weight, seconds, max(peak - held, 0)


def measure(name: str, weight: Tensor, inputs: Tensor, labels: list[str]) -> list[dict[str, Any]]:
    """One row of the table for every setting."""
    whole, fit, judge = inputs, inputs[: len(inputs) // 2], inputs[len(inputs) // 2 :]
    judged = sums(judge)
    rows = []
    for label in labels:
        pruned, seconds, peak = solve(weight, whole, RUNS[label])
        elsewhere, _, _ = solve(weight, fit, RUNS[label])
        row = {
            "layer": name,
            "run": label,
            "error": relative_error(pruned, weight, sums(whole)),
            "held_out": relative_error(elsewhere, weight, judged),
            "seconds": seconds,
            "peak_mib": peak / 2**20,
        }
        rows.append(row)
        print(
            f"{name:28s} {label:24s} {row['error']:9.4f} {row['held_out']:9.3f} "
            f"{seconds:9.3f} {row['peak_mib']:8.1f}",
            flush=True,
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        f"{platform.machine()}, {threads()} threads, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}\n",
        "| layer | method | error % | held out % | seconds | MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['layer']} | {row['run']} | {row['error']:.4f} | {row['held_out']:.3f} | "
            f"{row['seconds']:.3f} | {row['peak_mib']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Error against time, a panel per layer, a curve per method from bare to refined."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure, axes = plt.subplots(2, -(-len(layers) // 2), figsize=(16, 8), squeeze=False)
    for axis, layer in zip(axes.flat, layers, strict=False):
        found = {row["run"]: row for row in rows if row["layer"] == layer}
        for method, labels in CURVES.items():
            points = sorted(
                (found[label]["seconds"], found[label]["error"])
                for label in labels
                if label in found
            )
            axis.plot(*zip(*points, strict=True), marker="o", label=method)
        axis.set(xscale="log", yscale="log", title=layer, xlabel="seconds", ylabel="100 L(W)/L(0)")
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--golden", type=Path, default=ROOT.parent / "shared" / "golden")
    parser.add_argument("--output", type=Path, help="folder for solvers.json, .md and .png")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--only-golden", action="store_true", help="leave out synthetic shapes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    set_threads(options.threads)
    layers = {}
    for file in sorted(options.golden.glob("*.safetensors")) if options.golden.is_dir() else []:
        tensors = load_file(file)
        if "inputs" in tensors:
            layers[file.stem] = (tensors["weight"], tensors["inputs"])
    if not options.only_golden:
        layers |= {f"synthetic {r}x{c}": synthetic(r, c) for r, c in SHAPES}
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    print(f"{'layer':28s} {'run':24s} {'error %':>9s} {'held-out':>9s} {'seconds':>9s} {'MiB':>8s}")
    rows: list[dict[str, Any]] = []
    warm = synthetic(16, 64)
    for label in options.runs:  # compile and start libraries before anything is timed
        solve(*warm, RUNS[label])
    for name, (weight, inputs) in layers.items():
        weight, inputs = weight.to(options.device), inputs.to(options.device)
        rows += measure(name, weight, inputs, options.runs)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "solvers.json").write_text(json.dumps(rows, indent=1))
        (options.output / "solvers.md").write_text(markdown(rows))
        plot(rows, options.output / "solvers.png")


if __name__ == "__main__":
    main()
