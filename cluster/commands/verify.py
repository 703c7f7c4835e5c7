"""`prox24 verify`: a pruned model held against its source, as a table or as JSON."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from cluster.source import resolve_model
from cluster.terminal import as_text, bar, plain_table, shows_bars, terminal
from pipeline.runtime.units import size

if TYPE_CHECKING:
    from pipeline.output.verify import Verification

DESCRIPTION = (
    "Hold a pruned model against its source: every pruned layer obeys its pattern, nothing else "
    "differs by a byte, hashes and shapes are as stated. Exit status 1 where something is wrong."
)


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
    from pipeline.output.verify import verify

    source = resolve_model(options.source)
    console = terminal()
    shown = shows_bars(console)
    with bar(console, "{task.fields[read]}") if shown else contextlib.nullcontext() as progress:
        task = progress.add_task("verifying", total=None, read="", error="") if progress else None

        def advance(file: str, done: int, total: int) -> None:
            if progress is not None and task is not None:
                read = f"{size(done)} of {size(total)}"
                progress.update(task, completed=done, total=total, read=read)

        found = verify(
            resolve_model(options.output).folder,
            source.folder,
            trust_remote_code=options.trust_remote_code,
            advance=advance,
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
    table = plain_table(("layer", "shape", "pattern", "zeros"))
    for layer in found.layers:
        shape = " x ".join(map(str, layer.shape))
        wrong = "" if layer.holds else " !"
        table.add_row(layer.name, shape, layer.pattern, f"{100 * layer.zeros:.3f} %{wrong}")
    holding = sum(layer.holds for layer in found.layers)
    # Of little, the time is that of opening files.
    speed = f" ({found.seconds / (found.bytes / 1e9):.1f} s per GB)" if found.bytes > 1e8 else ""
    count = len(found.problems)
    verdict = "sound" if not count else f"{count} problem" + ("s" if count > 1 else "")
    return as_text(
        [
            table,
            f"{holding} of {len(found.layers)} pruned layers hold their pattern; "
            f"{size(found.bytes)} read in {found.seconds:.1f} s{speed}: {verdict}",
        ]
    )
