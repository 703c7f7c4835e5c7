"""A job's identity: what `run.json` says, and how a run directory of another job is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.prune import PruneConfig
from pipeline.models.skeleton import Skeleton
from pipeline.records.schemas import MANIFEST_SCHEMA
from pipeline.text.documents import is_local
from pipeline.version import VERSION
from storage.errors import CorruptFileError, DataError, RunDirectoryError
from storage.files.commit import publish_json, read_json, sha256_file
from storage.files.hashing import StoredFile
from storage.model.files import ModelFiles, WeightFileFingerprint
from storage.output.weight_files import hash_side_files
from storage.run.directory import RunDirectory, differences
from storage.run.lock import RunLock

# Raised whenever a change gives other bytes for the same job: a half-done job must not mix both.
SOLVER_VERSION = 5
# What a manifest must hold.
_KEYS = {
    "job": dict,
    "tokens": dict,
    "weight_files": dict,
    "tensors": dict,
    "side_files": dict,
    "source_parts": dict,
}


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
    """`run.json`; None in a new run directory.

    It is never made anew beside committed files: without it no one can tell which job they are of.
    Raises `CorruptFileError` where it is damaged, or missing beside them.
    """
    if run.manifest.exists():
        manifest = read_json(run.manifest, MANIFEST_SCHEMA)
        if not _KEYS.items() <= {key: type(value) for key, value in manifest.items()}.items():
            raise CorruptFileError(
                f"{run.manifest}: not as this prox24 writes it; delete the run directory to start "
                "anew, or use the version that wrote it"
            )
        return manifest
    if run.blocks_begun() or run.committed_activations():
        raise CorruptFileError(
            f"{run.manifest}: missing, but blocks of a job are committed beside it; restore it, or "
            "delete the run directory to start anew"
        )
    return None


def check_manifest(
    run: RunDirectory, manifest: dict[str, Any], job: dict[str, Any], source: ModelFiles
) -> None:
    """Raises `RunDirectoryError` naming what differs between the directory's job and this one.

    That includes files of the source model: all but its weights' values, which workers compare.
    """
    found = differences(manifest["job"], job)
    if [line.partition(":")[0] for line in found] == ["source"]:
        found += differences(manifest["source_parts"], source.parts())
    found += differences(manifest["side_files"], hash_side_files(source))
    if found:
        raise RunDirectoryError(
            f"{run.path} is the run directory of another job ({'; '.join(found[:5])}); choose "
            "another --run-dir, restore the files that differ, or delete it to start anew"
        )


def write_manifest(
    run: RunDirectory,
    lock: RunLock,
    job: dict[str, Any],
    tokens: StoredFile,
    source: ModelFiles,
    fingerprints: Sequence[WeightFileFingerprint],
    blocks: int,
) -> dict[str, Any]:
    """Publishes `run.json`, after which the directory belongs to this job; returns it."""
    hashes = source.hashes(fingerprints)
    payload = {
        "schema_version": MANIFEST_SCHEMA,
        "prox24": VERSION,
        "job": job,
        "tokens": tokens.to_json(),
        "weight_files": {f.file: f.sha256 for f in sorted(fingerprints, key=lambda f: f.file)},
        "blocks": blocks,
        # Hashes of what workers read again and again, to be verified each time.
        "tensors": dict(sorted(hashes.items())),
        "side_files": hash_side_files(source),
        "source_parts": source.parts(),
    }
    publish_json(run.manifest, payload, guard=lock.assert_held)
    return payload


def expect_source(run: RunDirectory, source: ModelFiles) -> None:
    """Has `source` verify every tensor that it reads against the manifest.

    Raises `CorruptFileError` where config.json or a header is not what the job began with, or the
    manifest is damaged.
    """
    manifest = read_json(run.manifest, MANIFEST_SCHEMA)
    changed = differences(manifest["source_parts"], source.parts())
    if changed:
        name = changed[0].partition(": ")[0]
        raise CorruptFileError(
            f"{source.source.where(name)}: not what it was when the job began; restore the file "
            "and run the same command again"
        )
    source.expected = manifest["tensors"]


def require_fingerprints(
    run: RunDirectory, manifest: dict[str, Any], fingerprints: Sequence[WeightFileFingerprint]
) -> None:
    """Compares the source's weight files with those the job began with."""
    found = {fingerprint.file: fingerprint.sha256 for fingerprint in fingerprints}
    changed = differences(manifest["weight_files"], found)
    if changed:
        raise RunDirectoryError(
            f"{run.path} is the run directory of another model: {'; '.join(changed[:3])}; restore "
            "the weight files, or delete the run directory to start anew"
        )
