"""`prox24 report`: a finished job's report, made again."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = (
    "Make report/report.html and report/report.parquet of a finished job again, from its run "
    "directory alone: no cluster, no model."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prox24 report`."""
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", help="a job's run directory, or the OUTPUT that it is of"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def report_command(options: argparse.Namespace) -> int:
    """Makes the report, prints where it is. Raises `RunDirectoryError` without a finished job."""
    from pipeline.reporting.write import report_again

    print(f"wrote {report_again(Path(options.run_dir))}")
    return 0
