"""`run.json`, the manifest: a job's identity, by which another job's run directory is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from pipeline.config.fields import values_of
from pipeline.config.prune import PruneConfig
from pipeline.config.text import TextOptions
from pipeline.models.skeleton import Skeleton
from pipeline.records.schemas import MANIFEST_SCHEMA
from pipeline.text.chat import read_template
from pipeline.text.files import is_local, local_identity
from pipeline.version import VERSION
from storage.errors import CorruptFileError, RunDirectoryError
from storage.files.commit import publish_json, read_json
from storage.files.hashing import StoredFile
from storage.model.files import ModelFiles, WeightFileFingerprint
from storage.output.weight_files import hash_side_files
from storage.run.directory import RunDirectory, differences
from storage.run.lock import RunLock

# Increased by every change that gives other bytes for the same job: a resumed job must not mix the
# results of two versions.
SOLVER_VERSION = 8
# The keys of a manifest that are read, with their types.
_KEYS = {
    "job": dict,
    "tokens": dict,
    "text": dict,
    "weight_files": dict,
    "tensors": dict,
    "side_files": dict,
    "source_parts": dict,
}


def data_identity(dataset: str) -> dict[str, Any]:
    """The identity of a text: see `local_identity`, or a hub id without a hash.

    Raises `DataError` for local text that cannot be read.
    """
    return local_identity(dataset) if is_local(dataset) else {"name": dataset, "sha256": None}


def text_identity(options: TextOptions) -> dict[str, Any]:
    """How a text is read, without local paths: of a chat template's file its SHA-256.

    Raises `ConfigError` for a template that cannot be read.
    """
    identity = values_of(options, TextOptions)
    if options.chat_template is not None:
        text = read_template(options.chat_template)
        identity["chat_template"] = hashlib.sha256(text.encode()).hexdigest()
    return identity


def describe_job(
    config: PruneConfig, skeleton: Skeleton, dataset: dict[str, Any]
) -> dict[str, Any]:
    """Everything that the result depends on, as JSON without local paths; equal for equal jobs."""
    settings = config.what()
    del settings["dataset"]
    settings |= text_identity(config)
    if (how := config.reconstruction(config.nsamples)) is not None:
        # Unset ones depend on nsamples.
        settings |= {"reconstruct_batch": how.batch, "reconstruct_epochs": how.epochs}
    if config.eval_dataset is not None:
        settings["eval_dataset"] = data_identity(config.eval_dataset)
    return {
        "settings": settings,
        "solver": config.solver_settings(config.method).to_json(),
        "solver_version": SOLVER_VERSION,
        "dataset": dataset,
        "source": skeleton.files.identity(),
        "forward_dtype": str(skeleton.dtype).removeprefix("torch."),
        "forward_attention": skeleton.attention,
    }


def read_manifest(run: RunDirectory) -> dict[str, Any] | None:
    """The content of `run.json`; None in a new run directory.

    Raises `CorruptFileError` if it is damaged, or missing although blocks are committed: without it
    the job that they belong to is unknown.
    """
    if run.manifest.exists():
        # Older versions wrote no `text`.
        manifest = {"text": {}, **read_json(run.manifest, MANIFEST_SCHEMA)}
        if not _KEYS.items() <= {key: type(value) for key, value in manifest.items()}.items():
            raise CorruptFileError(
                f"{run.manifest}: not as this prox24 writes it; use the version that wrote it, or "
                "delete the run directory to start anew"
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
    """Raises `RunDirectoryError` if the directory's job is not this one, naming what differs.

    The source model's files are compared, except the values of its weights: `require_fingerprints`
    compares those, when the workers have hashed them.
    """
    changed = differences(manifest["job"], job)
    if [line.partition(":")[0] for line in changed] == ["source"]:
        changed += differences(manifest["source_parts"], source.parts())
    changed += differences(manifest["side_files"], hash_side_files(source))
    if changed:
        raise RunDirectoryError(
            f"{run.path} is the run directory of another job ({'; '.join(changed[:5])}); choose "
            "another --run-dir, restore the files that differ, or delete it to start anew"
        )


def write_manifest(
    run: RunDirectory,
    lock: RunLock,
    job: dict[str, Any],
    tokens: StoredFile,
    text: dict[str, Any],
    source: ModelFiles,
    fingerprints: Sequence[WeightFileFingerprint],
    blocks: int,
) -> dict[str, Any]:
    """Publishes `run.json`, by which the directory becomes this job's; returns its content.

    text: see `pipeline.records.tokens.CommittedTokens`.
    """
    hashes = source.hashes(fingerprints)
    payload = {
        "schema_version": MANIFEST_SCHEMA,
        "prox24": VERSION,
        "job": job,
        "tokens": tokens.to_json(),
        "text": text,
        "weight_files": {f.file: f.sha256 for f in sorted(fingerprints, key=lambda f: f.file)},
        "blocks": blocks,
        # Workers read these tensors several times, and compare them with the hashes each time.
        "tensors": dict(sorted(hashes.items())),
        "side_files": hash_side_files(source),
        "source_parts": source.parts(),
    }
    publish_json(run.manifest, payload, guard=lock.assert_held)
    return payload


def expect_source(run: RunDirectory, source: ModelFiles) -> None:
    """Has `source` compare every tensor that it reads with its hash in the manifest.

    Raises `CorruptFileError` if config.json or a header has changed since the job began, or if the
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
    """Raises `RunDirectoryError` if a weight file of the source differs from the manifest."""
    hashes = {fingerprint.file: fingerprint.sha256 for fingerprint in fingerprints}
    changed = differences(manifest["weight_files"], hashes)
    if changed:
        raise RunDirectoryError(
            f"{run.path} is the run directory of another model: {'; '.join(changed[:3])}; restore "
            "the weight files, or delete the run directory to start anew"
        )
