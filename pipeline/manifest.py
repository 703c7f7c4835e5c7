"""A job's identity: what `run.json` says, and how a run directory of another job is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import PruneConfig
from pipeline.documents import is_local
from pipeline.model import Skeleton
from pipeline.version import VERSION
from storage.commit import StoredFile, publish_json, read_json, sha256_file
from storage.errors import DataError, RunDirectoryError
from storage.lock import RunLock
from storage.run_directory import RunDirectory, differences

MANIFEST_SCHEMA = 1
# Raised whenever a change gives other bytes for the same job: a half-done job must not mix both.
SOLVER_VERSION = 1


def data_identity(dataset: str) -> dict[str, Any]:
    """What the text is: a local file's name and SHA-256, or a hub id. Raises `DataError`."""
    if not is_local(dataset):
        return {"name": dataset, "sha256": None}
    path = Path(dataset).expanduser()
    if not path.is_file():
        raise DataError(f"{dataset} is not a file; name a .txt, .jsonl, .parquet or .arrow file")
    return {"name": path.name, "sha256": sha256_file(path)}


def describe_job(
    config: PruneConfig, skeleton: Skeleton, dataset: dict[str, Any]
) -> dict[str, Any]:
    """Everything that decides the result, as JSON; equal for equal jobs, free of local paths."""
    settings = config.what()
    del settings["dataset"]
    if config.eval_dataset is not None:
        settings["eval_dataset"] = data_identity(config.eval_dataset)
    return {
        "settings": settings,
        "solver": config.solver_settings(config.method).to_json(),
        "solver_version": SOLVER_VERSION,
        "dataset": dataset,
        "source": skeleton.files.identity(),
        "forward_dtype": str(skeleton.dtype).removeprefix("torch."),
    }


def read_manifest(run: RunDirectory) -> dict[str, Any] | None:
    """`run.json`; None in a new run directory. Raises `RunDirectoryError` if it is not one."""
    if run.manifest.exists():
        return read_json(run.manifest, MANIFEST_SCHEMA)
    return None


def check_manifest(run: RunDirectory, manifest: dict[str, Any], job: dict[str, Any]) -> None:
    """Raises `RunDirectoryError` naming what differs between the directory's job and this one."""
    found = differences(manifest["job"], job)
    if found:
        raise RunDirectoryError(
            f"{run.path} is the run directory of another job ({'; '.join(found[:5])}); choose "
            "another --run-dir, or delete it to start anew"
        )


def write_manifest(
    run: RunDirectory,
    lock: RunLock,
    job: dict[str, Any],
    tokens: StoredFile,
    weight_files: dict[str, str],
    blocks: int,
) -> None:
    """Publishes `run.json`, after which the directory belongs to this job."""
    payload = {
        "schema_version": MANIFEST_SCHEMA,
        "prox24": VERSION,
        "job": job,
        "tokens": tokens.to_json(),
        "weight_files": weight_files,
        "blocks": blocks,
    }
    publish_json(run.manifest, payload, guard=lock.assert_held)


def require_fingerprints(
    run: RunDirectory, manifest: dict[str, Any], found: dict[str, str]
) -> None:
    """Compares the source's weight files with those the job began with."""
    changed = differences(manifest["weight_files"], found)
    if changed:
        raise RunDirectoryError(
            f"{run.path} is the run directory of another model: {'; '.join(changed[:3])}; restore "
            "the weight files, or delete the run directory to start anew"
        )
