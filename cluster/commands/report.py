"""`prox24 report`: a finished job's report, made again."""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.command import Command
from cluster.options import path_text
from pipeline.records.status import find_run_directory
from storage.files.trial import require_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The argument of `prox24 report`."""
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=path_text,
        help="a job's run directory, or the OUTPUT that it is of",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Makes the report and prints its path. Raises `RunDirectoryError` without a finished job."""
    path = Path(options.run_dir)
    # A wrong path is refused before pyarrow and matplotlib are imported.
    run = find_run_directory(path)
    require_folder(run.report(), "the report's folder", "change who may write there")
    from pipeline.reporting.write import report_again

    print(f"wrote {report_again(path)}")
    return 0


COMMAND = Command(
    name="report",
    help="make a finished job's report again",
    description="Make report/report.html and report/report.parquet of a finished job again, from "
    "its run directory alone: no cluster, no model.",
    arguments=add_arguments,
    run=run,
)
