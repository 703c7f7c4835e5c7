"""What being distributed costs: prox24 against the plainest loop that does the same work.

The loop holds the whole model and all activations in one process's memory: dense forward with
hooks that sum x xᵀ, the same solver on whole layers, pruned forward. No files, no workers, no
hashes. Same tokens, same dtype; two threads against two workers of one thread each.

    python benchmarks/yardstick.py MODEL --text shared/data/wikitext2-valid.txt --method sparsegpt
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peak import run
from benchmarks.perplexity import split_text

ROOT = Path(__file__).resolve().parent.parent


def plain(model_folder: Path, tokens_file: Path, method: str, threads: int) -> dict[str, Any]:
    """The plain loop; seconds by kind."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.config.solver import SolverSettings
    from pipeline.solvers.registry import solver_for
    from pipeline.solvers.types import Statistics
    from storage.run.activations import read_tokens

    torch.set_num_threads(threads)
    seconds = {"load": 0.0, "forward": 0.0, "hessian": 0.0, "solve": 0.0}
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokens, _ = read_tokens(tokens_file)
    solver = solver_for(SolverSettings(method=method))
    seconds["load"] = time.perf_counter() - began

    class Inputs(Exception):
        pass

    calls: list[Any] = []

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))
        raise Inputs

    with torch.no_grad():
        handle = model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        for sequence in tokens:
            try:
                model(sequence[None], use_cache=False)
            except Inputs:
                continue
        handle.remove()
        hidden = [args[0] for args, _ in calls]
        keywords = calls[0][1]
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            groups = [
                [attention.q_proj, attention.k_proj, attention.v_proj],
                [attention.o_proj],
                [mlp.gate_proj, mlp.up_proj],
                [mlp.down_proj],
            ]
            sums = [torch.zeros(g[0].in_features, g[0].in_features) for g in groups]

            def add(_: Any, args: Any, total: Any = None) -> None:
                at = time.perf_counter()
                x = args[0].reshape(-1, args[0].shape[-1]).float()
                total.addmm_(x.T, x)
                seconds["hessian"] += time.perf_counter() - at

            handles = [
                group[0].register_forward_pre_hook(lambda m, a, t=total: add(m, a, t))
                for group, total in zip(groups, sums, strict=True)
            ]
            before = seconds["hessian"]
            began = time.perf_counter()
            for x in hidden:
                block(x, **keywords)
            seconds["forward"] += time.perf_counter() - began - (seconds["hessian"] - before)
            for handle in handles:
                handle.remove()
            began = time.perf_counter()
            for group, total in zip(groups, sums, strict=True):
                statistics = Statistics(
                    columns=total.shape[0],
                    tokens=tokens.numel(),
                    sequences=len(tokens),
                    hessian=total,
                )
                prepared = solver.prepare(statistics)
                weights = {str(number): layer.weight for number, layer in enumerate(group)}
                for name, solution in solver.solve_group(weights, prepared).items():
                    group[int(name)].weight.copy_(solution.weight)
            seconds["solve"] += time.perf_counter() - began
            began = time.perf_counter()
            hidden = [block(x, **keywords) for x in hidden]
            hidden = [x[0] if isinstance(x, tuple) else x for x in hidden]
            seconds["forward"] += time.perf_counter() - began
    return seconds


def phase_times(trace: Path) -> dict[str, tuple[float, float]]:
    """Of every phase in a trace: its seconds at the driver, and the share of the ranks' time in
    which they had nothing to do in it."""
    text = trace.read_text(encoding="utf-8").rstrip().rstrip("]").rstrip().rstrip(",")
    events = [event for event in json.loads(text + "]") if event.get("ph") == "X"]
    ranks = {event["pid"] for event in events} - {0}
    sums: dict[str, list[float]] = {}
    for phase in (event for event in events if event["pid"] == 0):
        wall = phase["dur"] / 1e6
        # Of what a rank did in it, the longest is the whole: kinds of work lie within.
        busy = [
            max(
                (e["dur"] / 1e6 for e in events if e["pid"] == rank and _within(e, phase)),
                default=0,
            )
            for rank in ranks
        ]
        if any(busy):
            total = sums.setdefault(phase["name"], [0.0, 0.0])
            total[0] += wall
            total[1] += wall - sum(busy) / len(busy)
    return {name: (wall, idle / wall) for name, (wall, idle) in sums.items()}


def _within(event: dict[str, Any], phase: dict[str, Any]) -> bool:
    """Whether an event of a rank's, whose clock may be a little off, belongs to a phase."""
    middle = event["ts"] + event["dur"] / 2
    return bool(phase["ts"] <= middle <= phase["ts"] + phase["dur"])


def main() -> None:
    """Alternates the two and prints the ratio of the best times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/prox24-yardstick"))
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--nsamples", type=int, default=40)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--plain", type=Path, help="run the plain loop on this tokens file")
    options = parser.parse_args()
    if options.plain:
        print(json.dumps(plain(options.model, options.plain, options.method, 2)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    calibration, _ = split_text(options.text, options.folder)
    output, run_directory = options.folder / "pruned", options.folder / "pruned.run"
    results: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for workers in options.workers:
            shutil.rmtree(output, ignore_errors=True)
            shutil.rmtree(run_directory, ignore_errors=True)
            trace = options.folder / f"trace-{workers}.json"
            peak = run(
                [
                    *(sys.executable, "-m", "cluster", "prune", str(options.model), str(output)),
                    *("--method", options.method, "--dataset", str(calibration)),
                    *("--nsamples", str(options.nsamples), "--seqlen", str(options.seqlen)),
                    *("--workers", str(workers), "--threads", "1", "--batch-size", "1"),
                    *("--trace", str(trace)),
                ],
                log=options.folder / "prune.log",
                environment={"PYTHONPATH": str(ROOT)},
                interval=None,
            )
            results.setdefault(f"prox24, {workers} workers", []).append(peak.seconds)
            summary = json.loads((run_directory / "report" / "summary.json").read_text())
            print(f"prox24, {workers} workers: {peak.seconds:.1f} s", summary["wall"], flush=True)
            print({kind: round(value, 1) for kind, value in summary["seconds"].items()})
            for name, (wall, idle) in phase_times(trace).items():
                print(f"  {name}: {wall:.1f} s, ranks idle {100 * idle:.1f} %", flush=True)
        began = time.monotonic()
        text = subprocess.run(
            [
                *(sys.executable, __file__, str(options.model), "--method", options.method),
                *("--plain", str(run_directory / "tokens.arrow")),
            ],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, OMP_NUM_THREADS="2"),
        ).stdout
        elapsed = time.monotonic() - began
        results.setdefault("plain", []).append(elapsed)
        print(f"plain, 2 threads: {elapsed:.1f} s", text.strip().splitlines()[-1], flush=True)
    best = {name: min(values) for name, values in results.items()}
    for name, value in best.items():
        print(f"{name}: {value:.1f} s, {value / best['plain']:.2f} x the plain loop")


if __name__ == "__main__":
    main()
