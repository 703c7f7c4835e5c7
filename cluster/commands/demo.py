"""`prox24 demo`: the main job on a small real model, with nothing to download but packages."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from cluster.command import Command
from cluster.console import Console
from cluster.options import path_text
from cluster.terminal import as_text, plain_table
from pipeline.config.evaluate import EvalConfig
from pipeline.config.prune import PruneConfig
from pipeline.config.runtime import RuntimeConfig
from pipeline.runtime.units import duration
from storage.files.trial import require_folder

_WORKERS = 2
_SEQLEN = 512
_CALIBRATION_SEQUENCES = 32
_EPOCHS = 3
_EVALUATION_SEQUENCES = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The option of `prox24 demo`."""
    parser.add_argument(
        "--folder",
        default="demo",
        type=path_text,
        help="where models and texts go (default: demo)",
    )


def run(options: argparse.Namespace) -> int:
    """Prunes SmolLM2-135M-Instruct on a Ray started for it; prints a table. Returns 0."""
    require_folder(Path(options.folder), "--folder", "name another folder")
    from cluster.dispatch.ray_executor import RayExecutor
    from pipeline.demo_model import demo_model, demo_texts
    from pipeline.evaluation.perplexity import evaluate
    from pipeline.prune import prune

    folder = Path(options.folder)
    console = Console()
    began = time.monotonic()
    console.print("preparing SmolLM2-135M-Instruct and text that ships with Python")
    source = demo_model(folder / "SmolLM2-135M-Instruct")
    calibration, evaluation = demo_texts(folder / "text")

    def executor(config: RuntimeConfig) -> Any:
        return lambda: RayExecutor(config)

    def perplexity(model: Path) -> float:
        config = EvalConfig(
            dataset=str(evaluation),
            workers=_WORKERS,
            nsamples=_EVALUATION_SEQUENCES,
            seqlen=_SEQLEN,
        )
        return float(evaluate(model, config, executor(config), console)["perplexity"])

    rows = [("dense", perplexity(source), source, 0.0)]
    for method in ("magnitude", "prox_admm"):
        output = folder / f"SmolLM2-135M-Instruct-{method}-2-4"
        _clear(output)
        console.print(f"pruning with {method}")
        config = PruneConfig(
            method=method,
            dataset=str(calibration),
            workers=_WORKERS,
            overwrite=True,
            nsamples=_CALIBRATION_SEQUENCES,
            seqlen=_SEQLEN,
            reconstruct_epochs=_EPOCHS,
        )
        started = time.monotonic()
        prune(source, output, config, executor(config), console)
        rows.append((method, perplexity(output), output, time.monotonic() - started))
    _table(rows, time.monotonic() - began)
    return 0


def _clear(output: Path) -> None:
    """A finished demo run starts anew; an interrupted one goes on."""
    if (output / "prox24.json").exists():
        shutil.rmtree(output)
        shutil.rmtree(output.with_name(output.name + ".run"), ignore_errors=True)


def _table(rows: list[tuple[str, float, Path, float]], seconds: float) -> None:
    from pipeline.output.sparsity import zero_share

    table = plain_table(
        ("model", "perplexity", "zeros in the linears", "time"), "SmolLM2-135M-Instruct, 2:4"
    )
    for name, value, folder, took in rows:
        table.add_row(
            name,
            f"{value:.2f}",
            f"{100 * zero_share(folder):.1f} %",
            duration(took) if took else "",
        )
    words = (
        f"Whole demo: {duration(seconds)}. Calibrated on {_CALIBRATION_SEQUENCES} x {_SEQLEN} "
        "tokens of Python's language reference, evaluated on its held-out last fifth. So little "
        f"text, of one kind, and {_EPOCHS} epochs of each block's reconstruction are for show: "
        "real pruning takes 128 x 2048 tokens or more of C4, and 8 epochs.\n"
    )
    print(as_text([table, words]))
    print(f"The pruned model: {rows[-1][2].absolute()}")
    print("Prune your own:")
    print("  prox24 prune MODEL OUTPUT --dataset TEXT --nsamples 128 --seqlen 2048")


COMMAND = Command(
    name="demo",
    help="prune a small real model on this machine",
    description="Prune SmolLM2-135M-Instruct on a Ray cluster of this machine, by magnitude and by "
    "prox_admm, and compare perplexities. The model comes as a Python package, so that a package "
    "index is all it needs.",
    arguments=add_arguments,
    run=run,
)
