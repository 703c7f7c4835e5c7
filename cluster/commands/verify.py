"""`prox24 verify`: a pruned model checked against its source, as a table or as JSON."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from cluster.command import Command
from cluster.options import path_text
from cluster.source import resolve_model
from cluster.terminal import as_text, bar, plain_table, shows_bars, terminal
from pipeline.runtime.units import size

if TYPE_CHECKING:
    from pipeline.output.verify import Verification


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prox24 verify`."""
    parser.add_argument(
        "output", metavar="OUTPUT", type=path_text,
        help="folder or URI that `prox24 prune` has written",
    )  # fmt: skip
    parser.add_argument(
        "--source", required=True, type=path_text,
        help="the model it was made from: local folder, URI, or hub id",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )


def run(options: argparse.Namespace) -> int:
    """Verifies and prints; returns the exit status: 0, or 1 where something is wrong."""
    source, output = resolve_model(options.source), resolve_model(options.output)
    from pipeline.output.verify import verify

    console = terminal()
    shown = shows_bars(console)
    with bar(console, "{task.fields[read]}") if shown else contextlib.nullcontext() as progress:
        task = progress.add_task("verifying", total=None, read="", error="") if progress else None

        def advance(file: str, done: int, total: int) -> None:
            if progress is not None and task is not None:
                read = f"{size(done)} of {size(total)}"
                progress.update(task, completed=done, total=total, read=read)

        result = verify(
            output.folder,
            source.folder,
            trust_remote_code=options.trust_remote_code,
            advance=advance,
        )
    if options.json:
        print(json.dumps({"sound": not result.problems, **dataclasses.asdict(result)}))
    else:
        print(verification_text(result), end="")
        for problem in result.problems:
            print(f"prox24: {problem}", file=sys.stderr)
    return 1 if result.problems else 0


def verification_text(result: Verification) -> str:
    """The table of layers and a summary, as text of at most 80 columns."""
    table = plain_table(("layer", "shape", "pattern", "zeros"))
    for layer in result.layers:
        shape = " x ".join(map(str, layer.shape))
        wrong = "" if layer.holds else " !"
        table.add_row(layer.name, shape, layer.pattern, f"{100 * layer.zeros:.3f} %{wrong}")
    holding = sum(layer.holds for layer in result.layers)
    # Of little, the time is that of opening files.
    speed = f" ({result.seconds / (result.bytes / 1e9):.1f} s per GB)" if result.bytes > 1e8 else ""
    count = len(result.problems)
    verdict = "sound" if not count else f"{count} problem" + ("s" if count > 1 else "")
    return as_text(
        [
            table,
            f"{holding} of {len(result.layers)} pruned layers hold their pattern; "
            f"{size(result.bytes)} read in {result.seconds:.1f} s{speed}: {verdict}",
        ]
    )


COMMAND = Command(
    name="verify",
    help="check a pruned model against its source",
    description="Check a pruned model against its source: every pruned layer obeys its pattern, "
    "nothing else differs by a byte, hashes and shapes are as stated. Exit status 1 where "
    "something is wrong.",
    arguments=add_arguments,
    run=run,
)
