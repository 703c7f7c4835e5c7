"""`prox24 status`: the state of a job by its run directory, as text or as JSON.

Imports neither Ray nor torch: it answers at once, on any machine that sees the directory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.command import Command
from cluster.options import path_text
from cluster.terminal import print_labelled, terminal
from pipeline.reconstruct.results import digits
from pipeline.records.status import find_run_directory, read_status
from pipeline.runtime.units import duration, size

_SHOWN_ATTEMPTS = 5
_SHOWN_BLOCKS = 8
_ENDED = ("dead", "interrupted", "failed", "stopped")
_STYLES = {
    "running": "green", "finished": "green", "frozen": "yellow", "silent": "yellow",
    "interrupted": "yellow", "stopped": "yellow", "dead": "red", "failed": "red",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prox24 status`."""
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=path_text,
        help="a job's run directory, or the OUTPUT that it is of",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Prints the status of `options.run_dir`. Raises `RunDirectoryError` if it is none."""
    status = read_status(find_run_directory(Path(options.run_dir)))
    if options.json:
        print(json.dumps(status))
        return 0
    print_labelled(terminal(stderr=False), _lines(status))
    return 0


def _lines(status: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    state = status["state"]
    yield "run", status["run_directory"]
    yield "state", Text(_state(status), style=_STYLES.get(state, ""))
    if job := _job(status["job"]):
        yield "job", job
    yield "blocks", _blocks(status["blocks"])
    if (phase := status["phase"]) is not None:
        where = ("" if phase["block"] is None else f"block {phase['block']} ") + phase["name"]
        since = duration(phase["seconds"])
        yield "phase", f"it was in {where}" if state in _ENDED else f"{where}, for {since}"
    if status["eta_seconds"] is not None and state != "finished":
        pace = f"({status['seconds_per_block']:.1f} s a block)"
        when = " once it goes on" if state in _ENDED else ""
        yield "eta", f"{duration(status['eta_seconds'])}{when} {pace}"
    yield from _attempts(status["attempts"])
    yield "disk", _disk(status["disk"])
    if errors := _errors(status["blocks"]["committed"]):
        yield "errors", errors
    if errors := _output_errors(status["blocks"]["committed"]):
        yield "output", errors
    for name in ("note", "error"):
        if status[name]:
            yield name, status[name]
    for problem in status["problems"]:
        yield "damaged", problem
    if state in _ENDED:
        yield "", "committed blocks are kept: run the same command again to go on"


def _state(status: dict[str, Any]) -> str:
    owner, state = status["owner"], status["state"]
    if owner is None:
        return {
            "stopped": "stopped: no process holds the run directory",
            "failed": "failed: the job ended with an error",
            "interrupted": "interrupted: the job was asked to stop",
        }.get(state, str(state))
    beat = f"last heartbeat {duration(owner['heartbeat_age'])} ago"
    who = f"process {owner['pid']} on {owner['host']}"
    words = {
        "running": "running",
        "frozen": "frozen or suspended: it lives, but its heartbeat stopped",
        "silent": "silent: perhaps dead, which only its own host can tell",
        "dead": "dead: it ended without giving up the run directory",
    }[state]
    return f"{words}: {who}, {beat}"


def _job(job: dict[str, Any]) -> str:
    parts = []
    if job["method"]:
        parts.append(f"{job['method']} {job['pattern'] or ''}".strip())
    if job["source"] and job["output"]:
        parts.append(f"of {job['source']} into {job['output']}")
    if job["nsamples"] and job["seqlen"]:
        parts.append(f"on {job['nsamples']} x {job['seqlen']} tokens of {job['dataset'] or '?'}")
    return " ".join(parts)


def _blocks(blocks: dict[str, Any]) -> Any:
    done, total = blocks["done"], blocks["total"]
    if not total:
        return f"{done} done"
    line = Table.grid(padding=(0, 2))
    line.add_row(f"{done} of {total} done", ProgressBar(total=total, completed=done, width=30))
    return line


def _attempts(failures: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for failure in failures[-_SHOWN_ATTEMPTS:]:
        count = f"attempt {failure['attempt']} of {failure['attempts']} failed"
        yield "attempts", f"{failure['what']}: {count}: {failure['reason']}"


def _disk(disk: dict[str, int]) -> str:
    names = ["activations", *(["targets"] if disk["targets"] else []), "checkpoints"]
    parts = ", ".join(f"{name} {size(disk[name])}" for name in names)
    return f"{size(disk['bytes'])} used ({parts}); {size(disk['free'])} free"


def _errors(blocks: list[dict[str, Any]]) -> str:
    """The last blocks' relative errors."""
    known = [block for block in blocks if block["relative_error"] is not None]
    return ", ".join(
        f"block {block['block']} {block['relative_error']:.3f}%" for block in known[-_SHOWN_BLOCKS:]
    )


def _output_errors(blocks: list[dict[str, Any]]) -> str:
    """The last blocks' held-out errors, before and after their reconstruction."""
    known = [(block["block"], error) for block in blocks if (error := block["output_error"])]
    return ", ".join(
        f"block {block} {digits(error['before'])} -> {digits(error['after'])}%"
        for block, error in known[-_SHOWN_BLOCKS:]
    )


COMMAND = Command(
    name="status",
    help="show how far a job is, from its run directory",
    description="Show how far a job is, from its run directory alone; nothing is changed.",
    arguments=add_arguments,
    run=run,
)
