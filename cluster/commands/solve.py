"""`prox24 solve`: solvers replayed on one saved layer, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cluster.command import Command
from cluster.options import config_from, path_text
from cluster.terminal import as_text, plain_table
from pipeline.config.solve import SolveConfig
from storage.errors import DataError
from storage.files.trial import require_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The argument of `prox24 solve` beside the options of its config class."""
    parser.add_argument(
        "layer",
        metavar="LAYER",
        type=path_text,
        help=".safetensors file with `weight` (R, C) and `inputs` (sequences, tokens, C), or with "
        "`hessian` (C, C), the sum of x xᵀ over the `tokens` that its metadata states",
    )


def run(options: argparse.Namespace) -> int:
    """Solves the layer and prints the results; returns the exit status, 0."""
    config: SolveConfig = config_from(options, SolveConfig)
    layer = Path(options.layer)
    if not layer.is_file():  # as `read_layer_file` does, but before torch is imported
        raise DataError(f"{layer} is not a file; name a .safetensors file with a saved layer")
    if config.output is not None:
        names = [f"{method}.safetensors" for method in config.named_methods()]
        require_folder(Path(config.output), "--output", "name another folder", names)
    from pipeline.solve_layer import solve_layer

    results = solve_layer(layer, config)
    if config.json:
        print(json.dumps(results))
    else:
        print(solve_table(results), end="")
    return 0


def solve_table(results: dict[str, dict[str, Any]]) -> str:
    """The results as text: a line for each method, and its deviations from what was asked below."""
    table = plain_table(("method", "relative error", "seconds", "iterations", "MiB"))
    for method, result in results.items():
        table.add_row(
            method,
            "undefined"
            if result["relative_error"] is None
            else f"{result['relative_error']:.4f} %",
            f"{result['seconds']:.2f}",
            str(result["report"]["iterations"]),
            f"{result['peak_memory_bytes'] / 2**20:.0f}",
        )
    notes = [
        f"{method}: {text}"
        for method, result in results.items()
        for text in result["report"]["deviations"]
    ]
    return as_text([table, *notes])


COMMAND = Command(
    name="solve",
    help="replay solvers on one saved layer",
    config=SolveConfig,
    arguments=add_arguments,
    run=run,
)
