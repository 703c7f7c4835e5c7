"""Perplexity, time and memory of the methods on one model, by the commands that users run.

Every run goes on where an interrupted one stopped, and finished rows are kept in the results file.

    python benchmarks/perplexity.py MODEL --text shared/data/wikitext2-valid.txt --folder /tmp/ppl
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SOLVE_ONLY = ["--method", "prox_admm", "--reconstruct", "none"]
ROWS: dict[str, list[str]] = {
    "magnitude": ["--method", "magnitude"],
    "wanda": ["--method", "wanda"],
    "sparsegpt": ["--method", "sparsegpt"],
    "sparsegpt+cg": ["--method", "sparsegpt", "--refine", "cg"],
    "prox+cg": ["--method", "prox"],
    "prox_admm, solved only": SOLVE_ONLY,
    "sparsegpt+cg, shrinkage 0.03": [
        *("--method", "sparsegpt", "--refine", "cg"),
        *("--damping", "0.001", "--shrinkage", "0.03"),
    ],
    "prox_admm, damping 0.01": [*SOLVE_ONLY, "--damping", "0.01", "--shrinkage", "0"],
    "prox_admm, shrinkage 0.03": [*SOLVE_ONLY, "--damping", "0.001", "--shrinkage", "0.03"],
    "prox_admm, shrinkage auto": [*SOLVE_ONLY, "--shrinkage", "auto"],
    "prox_admm": [],
    "wanda, reconstructed": ["--method", "wanda", "--reconstruct", "block"],
    "sparsegpt, reconstructed": ["--method", "sparsegpt", "--reconstruct", "block"],
}
KINDS = ("forward", "hessian", "reduce", "choose", "solve", "train", "io", "load", "other")


def split_text(text: Path, folder: Path) -> tuple[Path, Path]:
    """The first 80 % of the text for calibration, the rest for evaluation."""
    whole = text.read_text(encoding="utf-8")
    cut = len(whole) * 4 // 5
    calibration, evaluation = folder / "calibration.txt", folder / "evaluation.txt"
    calibration.write_text(whole[:cut], encoding="utf-8")
    evaluation.write_text(whole[cut:], encoding="utf-8")
    return calibration, evaluation


def prox24(*arguments: str) -> str:
    """Standard output of a prox24 command; its progress goes to the terminal."""
    command = [sys.executable, "-m", "cluster", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure(name: str, options: argparse.Namespace, texts: tuple[Path, Path]) -> dict[str, Any]:
    """One row: prune (unless dense), evaluate, and what the run says of itself."""
    shared = ["--workers", str(options.workers)]
    model, row = options.model, {}
    output = options.folder / "pruned"
    if name != "dense":
        began = time.monotonic()
        prox24(
            *("prune", str(options.model), str(output), *ROWS[name], *shared),
            *("--dataset", str(texts[0]), "--nsamples", str(options.nsamples)),
            *("--seqlen", str(options.seqlen)),
        )
        row["seconds"] = time.monotonic() - began
        model, run = output, output.with_name("pruned.run")
        summary = json.loads((run / "report" / "summary.json").read_text(encoding="utf-8"))
        row |= {key: summary[key] for key in ("wall", "memory")}
        row["split"] = summary["seconds"]
    evaluated = prox24(
        *("eval", str(model), *shared, "--json", "--dataset", str(texts[1])),
        *("--nsamples", str(options.evaluation_sequences), "--seqlen", str(options.seqlen)),
    )
    row["perplexity"] = json.loads(evaluated)["perplexity"]
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(output.with_name("pruned.run"), ignore_errors=True)
    return row


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| method | perplexity | seconds | " + " | ".join(KINDS) + " | driver MiB | worker MiB |",
        "| --- | " + "---: | " * (len(KINDS) + 4),
    ]
    for name, row in results.items():
        if "split" not in row:
            lines.append(f"| {name} | {row['perplexity']:.2f} |" + " |" * (len(KINDS) + 3))
            continue
        split = " | ".join(f"{row['split'].get(kind, 0.0):.1f}" for kind in KINDS)
        driver, worker = (row["memory"][f"{who}_rss_bytes"] / 2**20 for who in ("driver", "worker"))
        lines.append(
            f"| {name} | {row['perplexity']:.2f} | {row['seconds']:.0f} | {split} | "
            f"{driver:.0f} | {worker:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table; `FOLDER/perplexity.json` has the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/prox24-perplexity"))
    parser.add_argument("--nsamples", type=int, default=40)
    parser.add_argument("--evaluation-sequences", type=int, default=20)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", nargs="+", default=["dense", *ROWS], choices=["dense", *ROWS])
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    texts = split_text(options.text, options.folder)
    path = options.folder / "perplexity.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in options.rows:
        if name not in results:
            results[name] = measure(name, options, texts)
            path.write_text(json.dumps(results, indent=1))
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores")
    print(table({name: results[name] for name in options.rows}))


if __name__ == "__main__":
    main()
