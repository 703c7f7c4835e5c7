"""Writes `report/report.html` and `report/report.parquet` of a finished job, also again later."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.output.write import RESULT_SCHEMA, finished_output
from pipeline.records.manifest import read_manifest
from pipeline.records.status import find_run_directory
from pipeline.records.summary import read_summary
from pipeline.reporting.layer_table import Facts, layer_rows
from pipeline.runtime.progress import Progress
from storage.errors import CorruptFileError, RunDirectoryError
from storage.files.commit import read_json, replace_file, replace_json
from storage.files.names import printable
from storage.object_store import Place, place
from storage.run.directory import RunDirectory
from storage.run.lock import RunLock
from storage.run.status_file import STATUS_NAME, STATUS_SCHEMA

PAGE_NAME = "report.html"
TABLE_NAME = "report.parquet"
_COPY_NAME = "result.json"
_LAYER_FIELDS = {
    "name": pa.string(), "block": pa.int64(), "layer": pa.string(), "kind": pa.string(),
    "rows": pa.int64(), "columns": pa.int64(), "dtype": pa.string(), "method": pa.string(),
    "pattern": pa.string(), "relative_error": pa.float64(), "objective": pa.float64(),
    "objective_before": pa.float64(), "objective_zero": pa.float64(), "statistic": pa.string(),
    "iterations": pa.int64(), "support_change": pa.float64(), "refine": pa.string(),
    "refine_steps": pa.int64(), "rows_kept_unrefined": pa.int64(), "damping": pa.float64(),
    "shrinkage": pa.float64(), "blocksize": pa.int64(), "dead_inputs": pa.int64(),
    "products": pa.string(), "deviations": pa.list_(pa.string()),
    "weights": pa.int64(), "kept": pa.int64(), "magnitude_too": pa.int64(),
    "inputs_never": pa.int64(), "inputs_rarely": pa.int64(), "inputs_often": pa.int64(),
    "norm_correlation": pa.float64(), "magnitude_share": pa.float64(),
    "groups": pa.map_(pa.string(), pa.int64()),
}  # fmt: skip


def leave_report(
    run: RunDirectory, output: Place, job: dict[str, Any], lock: RunLock, progress: Progress
) -> None:
    """The last step of a job, after its output is complete. A failure is only noted in one line.

    Raises `RunDirectoryError` where another process has taken over the run.
    """
    progress.phase("report")
    try:
        results = finished_output(output, job)
        if results is None:
            raise CorruptFileError(f"{output}: its prox24.json is missing")
        replace_json(run.report() / _COPY_NAME, results, guard=lock.assert_held)
        make_report(run, results, lock.assert_held)
    except Exception as error:
        lock.assert_held()
        reason = " ".join(str(error).split()) or type(error).__name__
        progress.note(f"no report was made ({reason}); the output is whole")


def make_report(
    run: RunDirectory, results: Mapping[str, Any], guard: Callable[[], None] | None = None
) -> Path:
    """Writes page and table into `report/` of the run directory; returns the path of the page.

    results: `prox24.json` of the output. guard: as in `replace_file`. Raises `CorruptFileError`
    where a record of the job is damaged or was written by another version.
    """
    # Importing matplotlib takes a second, and most commands do not draw.
    from pipeline.reporting.page import report_page

    try:
        facts = _facts(run, results)
        table = layer_table(facts.layers)
        page = report_page(facts)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptFileError(
            f"{run.report()}: its records are damaged or of another version of prox24 "
            f"({type(error).__name__}: {error}); use the version that ran the job"
        ) from error
    for name, raw in ((TABLE_NAME, table), (PAGE_NAME, page.encode("utf-8", "backslashreplace"))):
        with replace_file(run.report() / name, guard) as writer:
            writer.write(raw)
    return run.report() / PAGE_NAME


def report_again(path: Path) -> Path:
    """Makes the report of the finished job with run directory, or OUTPUT, `path`.

    Returns the path of the page. Needs no models, no cluster, and no lock, since files are replaced
    as a whole. Raises `RunDirectoryError` where there is no finished job.
    """
    run = find_run_directory(path)
    manifest = read_manifest(run)
    results = None
    if manifest is not None:
        if (run.report() / _COPY_NAME).exists():
            results = read_json(run.report() / _COPY_NAME, RESULT_SCHEMA)
        elif (output := _status(run).get("output")) is not None:
            results = finished_output(place(output), manifest["job"])
    if results is None:
        raise RunDirectoryError(
            f"{run.path}: no finished job, so there is nothing to report; `prox24 status` shows "
            "its progress"
        )
    return make_report(run, results)


def layer_table(layers: Sequence[Mapping[str, Any]]) -> bytes:
    """A Parquet file of `layer_rows`: one row per pruned layer, in model order."""
    columns = {
        name: pa.array([_value(layer[name]) for layer in layers], kind)
        for name, kind in _LAYER_FIELDS.items()
    }
    raw = io.BytesIO()
    pq.write_table(pa.table(columns), raw)
    return raw.getvalue()


def _value(value: Any) -> Any:
    return list(value.items()) if isinstance(value, Mapping) else value


def _facts(run: RunDirectory, results: Mapping[str, Any]) -> Facts:
    manifest = read_manifest(run)
    if manifest is None:
        raise CorruptFileError(f"{run.manifest}: missing")
    summary = read_summary(run)
    return Facts(
        run_directory=printable(str(run.path)),
        results=results,
        summary=summary,
        manifest=manifest,
        status=_status(run),
        layers=layer_rows(summary, results),
    )


def _status(run: RunDirectory) -> dict[str, Any]:
    with contextlib.suppress(CorruptFileError, RunDirectoryError):
        return read_json(run.path / STATUS_NAME, STATUS_SCHEMA)
    return {}
