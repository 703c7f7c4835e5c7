"""`prox24 compare`: finished jobs side by side, on the terminal and as files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.command import Command
from cluster.options import path_text
from cluster.terminal import WIDTH, as_text, plain_table
from pipeline.records.status import find_run_directory
from pipeline.reporting.tables import KINDS, Column, Table, arrow, known_rows, write_table
from storage.files.trial import require_folder

_LONGEST_NAME = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prox24 compare`."""
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=path_text,
        help="a job's run directory, or the OUTPUT that it is of",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="FOLDER", type=path_text,
        help="write compare.md, compare.csv and compare.parquet there",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Prints and writes the comparison; returns the exit status, 0."""
    paths = [Path(run) for run in options.runs]
    for path in paths:  # a wrong path is refused before torch is imported
        find_run_directory(path)
    if options.output is not None:
        names = [f"compare.{kind}" for kind in KINDS]
        require_folder(Path(options.output), "--output", "name another folder", names)
    from pipeline.reporting.compare_runs import comparison, read_runs

    table = comparison(read_runs(paths))
    if options.output is not None:
        write_table(Path(options.output), "compare", table)
    if options.json:
        print(json.dumps({"runs": arrow(table).to_pylist()}))
    else:
        print(table_text(table), end="")
    return 0


def table_text(table: Table, only: str | None = None) -> str:
    """The table as text of at most 80 columns; what does not fit beside each other, below.

    `only`: the one part that is wanted, without notes.
    """
    parts: list[Any] = []
    # Long names are listed once, with numbers that stand for them in the tables.
    names = table.rows
    if max(map(len, names)) > _LONGEST_NAME:
        for number, name in enumerate(names, start=1):
            parts.append(f"{number}  {name}")
        names = tuple(str(number) for number in range(1, len(names) + 1))
    for part, columns in table.parts().items():
        if only not in (None, part):
            continue
        parts.append(f"\n{part}")
        for beside in _beside(columns, len(names), WIDTH - max(map(len, ("run", *names)))):
            shown = plain_table(("run", *(column.title for column in beside)), fold=True)
            for row in known_rows(columns):
                shown.add_row(names[row], *(column.shown(row) for column in beside))
            parts.append(shown)
    return as_text([*parts, *(table.notes if only is None else ())])


def _beside(columns: Sequence[Column], rows: int, room: int) -> list[list[Column]]:
    """The columns in runs that fit into `room` characters; one that never fits stands alone."""
    tables: list[list[Column]] = [[]]
    left = room
    for column in columns:
        cells = [column.title, *(column.shown(row) for row in range(rows))]
        width = max(map(len, cells)) + 3  # rich puts three spaces between columns
        if tables[-1] and width > left:
            tables.append([])
            left = room
        tables[-1].append(column)
        left -= width
    return tables


COMMAND = Command(
    name="compare",
    help="compare finished jobs by their run directories",
    description="Compare finished jobs by their run directories alone: the settings that differ, "
    "perplexity where it was measured, errors by kind of layer, time and memory.",
    arguments=add_arguments,
    run=run,
)
