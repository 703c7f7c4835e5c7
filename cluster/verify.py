"""`prox24 verify`: a pruned model held against its source, as a table or as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from typing import TYPE_CHECKING

import rich.box
import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.source import resolve_model

if TYPE_CHECKING:
    from pipeline.verify import Verification

DESCRIPTION = (
    "Hold a pruned model against its source: every pruned layer obeys its pattern, nothing else "
    "differs by a byte, hashes and shapes are as stated. Exit status 1 where something is wrong."
)
_WIDTH = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prox24 verify`."""
    parser.add_argument(
        "output", metavar="OUTPUT", help="folder or URI that `prox24 prune` has written"
    )
    parser.add_argument(
        "--source", required=True, help="the model it was made from: local folder, URI, or hub id"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def verify_command(options: argparse.Namespace) -> int:
    """Verifies and prints; returns the exit status: 0, or 1 where something is wrong."""
    from pipeline.verify import verify

    source = resolve_model(options.source)
    terminal = rich.console.Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("verifying", total=None)
        found = verify(
            resolve_model(options.output).folder,
            source.folder,
            trust_remote_code=options.trust_remote_code,
            advance=lambda file, done, total: progress.update(task, completed=done, total=total),
        )
    if options.json:
        print(json.dumps({"sound": not found.problems, **dataclasses.asdict(found)}))
    else:
        print(verification_text(found), end="")
        for problem in found.problems:
            print(f"prox24: {problem}", file=sys.stderr)
    return 1 if found.problems else 0


def verification_text(found: Verification) -> str:
    """The table of layers and a summary, as text of at most 80 columns."""
    console = rich.console.Console(
        file=io.StringIO(), width=_WIDTH, highlight=False, color_system=None
    )
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for title in ("shape", "pattern", "zeros"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in found.layers:
        shape = " x ".join(map(str, layer.shape))
        wrong = "" if layer.holds else " !"
        table.add_row(layer.name, shape, layer.pattern, f"{100 * layer.zeros:.3f} %{wrong}")
    console.print(table)
    holding = sum(layer.holds for layer in found.layers)
    speed = found.seconds / max(found.bytes / 1e9, 1e-9)
    count = len(found.problems)
    verdict = "sound" if not count else f"{count} problem" + ("s" if count > 1 else "")
    console.print(
        f"{holding} of {len(found.layers)} pruned layers hold their pattern; "
        f"{found.bytes / 1e9:.2f} GB read in {found.seconds:.1f} s ({speed:.1f} s per GB): "
        f"{verdict}"
    )
    return str(console.file.getvalue())  # type: ignore[attr-defined]
