"""The state of a job, read from its run directory: without a cluster or the lock; writes nothing.

The records have the committed blocks with their errors and times, the lock file has the owner, and
`status.json`, if it is there and intact, adds the phase and the failed attempts. Imports neither
torch nor Ray, so that `prox24 status` starts fast.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any, cast

from pipeline.reconstruct.results import check_result, output_error
from pipeline.records.schemas import MANIFEST_SCHEMA, SUMMARY_SCHEMA
from storage.errors import CorruptFileError, RunDirectoryError
from storage.files.checked_json import is_count
from storage.files.commit import read_json
from storage.files.listing import listed
from storage.files.os_errors import file_error, is_damage
from storage.run.directory import BLOCK_SCHEMA, RunDirectory
from storage.run.lock import Owner, is_alive, read_owner
from storage.run.status_file import STATUS_NAME, STATUS_SCHEMA

# If a heartbeat is older than this, its owner may be dead (see `RunLock`).
STALE_SECONDS = 30.0
STATUS_OUTPUT_SCHEMA = 1
"""The schema number of what `read_status` returns."""
_AVERAGED_BLOCKS = 8
_LONGEST_TEXT = 500


def find_run_directory(path: Path) -> RunDirectory:
    """The run directory at `path`, or at `path.run` if `path` is a job's OUTPUT.

    Raises `RunDirectoryError` if neither is one, OSError where one cannot be looked into.
    """
    path = path.absolute()
    beside = path.with_name(path.name + ".run")
    for candidate in (path, beside):
        if _is_run_directory(candidate):
            return RunDirectory(candidate)
    raise RunDirectoryError(
        f"neither {path} nor {beside.name} beside it is the run directory of a job; give what "
        "--run-dir named, or OUTPUT"
    )


def _is_run_directory(path: Path) -> bool:
    """Raises OSError where this process may not see it."""
    patterns = ("run.json", STATUS_NAME, "lock-*.json")
    try:
        return path.is_dir() and any(listed(path, pattern) for pattern in patterns)
    except ValueError:  # no path at all
        return False
    except OSError as error:
        if not is_damage(error):
            raise
        return False


def read_status(run: RunDirectory) -> dict[str, Any]:
    """The job's state as JSON values; times in seconds, sizes in bytes, None for what is unknown.

    state: `running`; `frozen` (the process lives, but its heartbeat stopped); `silent` (the
    heartbeat of an owner on another host stopped); `dead`; `interrupted`; `failed`; `finished`; or
    `stopped` (no owner, and no record of how it ended). problems: one line per damaged file.
    """
    problems = [
        f"{folder}: is not a folder; restore it"
        for folder in (run.report(), run.path / "checkpoints")
        if os.path.lexists(folder) and not folder.is_dir()
    ]
    owner = _owner(run, problems)
    status = _record(run, run.path / STATUS_NAME, problems, STATUS_SCHEMA)
    manifest = _record(run, run.manifest, problems, MANIFEST_SCHEMA)
    blocks, total, finished = _blocks(run, manifest, status, problems)
    state = _state(owner, status, finished)
    # The status may be an earlier owner's.
    current = status if owner is None or status.get("nonce") == owner["nonce"] else {}
    owned = owner is not None
    return {
        "schema_version": STATUS_OUTPUT_SCHEMA,
        "run_directory": str(run.path),
        "state": state,
        "job": _job(manifest, status),
        "blocks": {"done": len(blocks), "total": total, "committed": blocks},
        "phase": _phase(current) if state != "finished" else None,
        "attempts": _failures(current),
        "owner": owner,
        "eta_seconds": _eta(blocks, total, current, running=state in ("running", "frozen")),
        "seconds_per_block": _pace(blocks),
        "disk": _disk(run),
        "note": _text(current.get("note")) if owned else None,
        "error": None if owned else _text(status.get("error")),
        "problems": problems,
    }


def _record(run: RunDirectory, path: Path, problems: list[str], schema: int) -> dict[str, Any]:
    """The content of a JSON file; {} if it is missing or damaged. Damage is added to `problems`."""
    if not os.path.lexists(path):
        return {}
    try:
        run.contained(path)
        return read_json(path, schema)
    except (CorruptFileError, RunDirectoryError, OSError) as error:
        if os.path.lexists(path):  # a live job deletes what it no longer needs
            problems.append(str(file_error(error) or error))
        return {}


def _owner(run: RunDirectory, problems: list[str]) -> dict[str, Any] | None:
    """The lock's owner, alive or dead; None without one. `alive`: None if this host cannot tell."""
    try:
        owner: Owner | None = read_owner(run.path)
    except OSError as error:
        problems.append(f"the lock cannot be read: {file_error(error) or error}")
        return None
    if owner is None:
        if any(run.path.glob("lock-*.json")):
            problems.append(f"{run.path}: the lock file is damaged; its owner is not known")
        return None
    return {
        "host": _text(owner.host),
        "pid": owner.pid,
        "heartbeat": owner.heartbeat,
        "heartbeat_age": max(0.0, time.time() - owner.heartbeat),
        "alive": is_alive(owner),
        "nonce": owner.nonce,
    }


def _state(owner: dict[str, Any] | None, status: dict[str, Any], finished: bool) -> str:
    if owner is not None:
        fresh = owner["heartbeat_age"] < STALE_SECONDS
        if owner["alive"] is False:
            return "dead"
        if owner["alive"]:
            return "running" if fresh else "frozen"
        return "running" if fresh else "silent"
    if finished:
        return "finished"
    return status["ended"] if status.get("ended") in ("interrupted", "failed") else "stopped"


def _blocks(
    run: RunDirectory, manifest: dict[str, Any], status: dict[str, Any], problems: list[str]
) -> tuple[list[dict[str, Any]], int | None, bool]:
    """The committed blocks' metrics, the number of all blocks, and whether the job has finished.

    A finished job has deleted its blocks' records; its summary has the same metrics.
    """
    blocks = []
    committed = run.committed_blocks()
    for block in committed:
        record = _record(run, run.record(block), problems, BLOCK_SCHEMA)
        results, layers = _mapping(record.get("results")), _mapping(record.get("layers"))
        seconds, trained = results.get("seconds"), _mapping(results.get("reconstruct"))
        blocks.append(_metrics(block, record, seconds, _error(layers), trained or None))
    total = next((n for n in (manifest.get("blocks"), status.get("blocks")) if is_count(n)), None)
    summary = _record(run, run.report() / "summary.json", problems, SUMMARY_SCHEMA)
    reported = summary.get("blocks")
    # The summary is written before the output; the records are deleted after it.
    finished = isinstance(reported, list) and not committed and bool(manifest)
    if finished:
        entries = [_mapping(entry) for entry in cast(list[Any], reported)]
        blocks = [
            _metrics(
                *(n, entry, entry.get("seconds"), _number(entry.get("relative_error"))),
                entry.get("reconstruct"),
            )
            for n, entry in enumerate(entries)
        ]
        total = len(blocks)
    return blocks, total, finished


def _metrics(
    block: int, record: dict[str, Any], seconds: object, error: float | None, trained: object
) -> dict[str, Any]:
    """A block's metrics. trained: the result of its reconstruction, if there was one."""
    return {
        "block": block,
        "relative_error": error,
        "output_error": _output_error(trained),
        "seconds": _number(seconds),
        "workers": record["world"] if is_count(record.get("world")) else None,
    }


def _output_error(trained: object) -> dict[str, float] | None:
    """The held-out error of a reconstructed block's output in per cent, before and after."""
    try:
        check_result(trained)
        pair = output_error(cast(Any, trained))
    except (LookupError, TypeError, ValueError):
        return None
    return None if pair is None else {"before": pair[0], "after": pair[1]}


def _error(layers: dict[str, Any]) -> float | None:
    """A block's relative error in per cent, as `pipeline.records.block.block_error` computes it."""
    reports = [_mapping(_mapping(layer).get("results")) for layer in layers.values()]
    objective = [_number(report.get("objective")) for report in reports]
    zero = [_number(report.get("objective_zero")) for report in reports]
    if not reports or None in objective or None in zero:
        return None
    below = sum(cast(list[float], zero))
    return 100 * sum(cast(list[float], objective)) / below if below > 0 else None


def _job(manifest: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
    job = _mapping(manifest.get("job"))
    settings = _mapping(job.get("settings"))
    counted = _mapping(manifest.get("text")).get("counted_tokens")
    return {
        "source": _text(status.get("source")),
        "output": _text(status.get("output")),
        "method": _text(settings.get("method")),
        "pattern": _text(settings.get("pattern")),
        "nsamples": settings["nsamples"] if is_count(settings.get("nsamples")) else None,
        "seqlen": settings["seqlen"] if is_count(settings.get("seqlen")) else None,
        "counted_tokens": counted if is_count(counted) else None,
        "dataset": _text(_mapping(job.get("dataset")).get("name")),
    }


def _phase(status: dict[str, Any]) -> dict[str, Any] | None:
    name, since = _text(status.get("phase")), _number(status.get("phase_started"))
    if name is None or since is None:
        return None
    block = status["block"] if is_count(status.get("block")) else None
    return {"name": name, "block": block, "seconds": max(0.0, time.time() - since)}


def _failures(status: dict[str, Any]) -> list[dict[str, Any]]:
    """Failed attempts of the current run of the job, in order."""
    failures = status.get("failures")
    return [
        {
            "what": _text(entry.get("what")) or "?",
            "attempt": entry["attempt"] if is_count(entry.get("attempt")) else None,
            "attempts": entry["attempts"] if is_count(entry.get("attempts")) else None,
            "reason": _text(entry.get("reason")) or "?",
            "time": _number(entry.get("time")),
        }
        for entry in map(_mapping, failures if isinstance(failures, list) else [])
    ]


def _pace(blocks: list[dict[str, Any]]) -> float | None:
    """Mean seconds of the last blocks, over all runs of the job."""
    seconds = [b["seconds"] for b in blocks[-_AVERAGED_BLOCKS:] if b["seconds"] is not None]
    return sum(seconds) / len(seconds) if seconds else None


def _eta(
    blocks: list[dict[str, Any]], total: int | None, status: dict[str, Any], *, running: bool
) -> float | None:
    """Estimated seconds for the remaining blocks: from now, or from when the job is resumed."""
    pace = _pace(blocks)
    if pace is None or total is None or len(blocks) > total:
        return None
    left = (total - len(blocks)) * pace
    since = _number(status.get("block_started"))
    if running and since is not None and left:
        left -= min(pace, max(0.0, time.time() - since))
    return left


def _disk(run: RunDirectory) -> dict[str, int]:
    """Bytes in the run directory and its large parts, and bytes free on its filesystem."""
    parts = {
        name: 0 if (run.path / name).is_symlink() else RunDirectory(run.path / name).size()
        for name in ("activations", "targets", "checkpoints")
    }
    free = 0
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(run.path).free
    return {"bytes": run.size(), **parts, "free": free}


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    """A finite number of at least 0; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < 2**63 and math.isfinite(value) else None


def _text(value: object) -> str | None:
    """A string that can be shown: printable, and cut if it is long; None for other types."""
    if not isinstance(value, str):
        return None
    shown = "".join(c if c.isprintable() else " " for c in value)
    return shown if len(shown) <= _LONGEST_TEXT else shown[: _LONGEST_TEXT - 1] + "…"
