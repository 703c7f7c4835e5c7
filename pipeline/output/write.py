"""Writes the finished model's folder: workers write the weight files, the driver the rest.

A folder is renamed when it is complete. In an object store, which has no rename, `prox24.json` is
written last: the output is complete when it exists.

The files do not depend on when, where or how often the job was interrupted: the same job gives the
same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from pipeline.config.prune import PruneConfig
from pipeline.models.skeleton import Skeleton
from pipeline.output.few_tokens import few_tokens
from pipeline.output.model_card import model_card
from pipeline.reconstruct.results import result_of, totals
from pipeline.records.block import block_error
from pipeline.runtime.split import deal
from pipeline.text.sequences import text_in_words
from pipeline.version import VERSION
from storage.files.checked_json import MAX_JSON_BYTES
from storage.files.commit import make_directory, sha256_bytes, write_new_file
from storage.files.hashing import StoredFile
from storage.files.listing import delete_folder
from storage.files.names import stem_of
from storage.files.os_errors import is_damage
from storage.files.small_file import read_small
from storage.object_store import ObjectFolder, Place
from storage.output.uploads import Guard, Uploads
from storage.output.weight_files import (
    copy_side_files,
    publish_output,
    read_side_files,
    recover_output,
)
from storage.run.checkpoints import BlockRecord
from storage.run.directory import RunDirectory
from storage.run.lock import STAMP_DIGITS, RunLock

RESULT_FILE = "prox24.json"
RESULT_SCHEMA = 1
_LIBRARIES = ("torch", "transformers", "safetensors", "pyarrow")


def finished_output(output: Place, job: dict[str, Any]) -> dict[str, Any] | None:
    """The content of `prox24.json` if `output` is the finished output of `job`; else None."""
    try:
        if isinstance(output, ObjectFolder):
            raw = output.read(RESULT_FILE, MAX_JSON_BYTES) or b""
        elif not (output / RESULT_FILE).is_file():
            return None
        else:
            raw = (output / RESULT_FILE).read_bytes()
        results = json.loads(raw.decode("utf-8"))
    except OSError as error:
        if not is_damage(error):
            raise
        return None
    except ValueError:
        return None
    if isinstance(results, dict) and results.get("job") == json.loads(json.dumps(job)):
        return results
    return None


def describe_output(
    *,
    job: dict[str, Any],
    text: Mapping[str, Any],
    skeleton: Skeleton,
    config: PruneConfig,
    skipped: Mapping[str, str],
    dense: Mapping[str, str],
    source_name: str,
    records: Sequence[BlockRecord],
    weight_files: Sequence[StoredFile],
    perplexity: dict[str, Any] | None,
) -> tuple[str, str]:
    """The texts of the output's model card and of its `prox24.json`.

    text: what `run.json` says of the calibration text. skipped: layers that the options leave
    dense, name → why; dense: what else of two or more dimensions the blocks have that is never
    pruned. records: of the blocks that the weight files were made from. perplexity: the finished
    model's, or None if it was not measured.
    """
    layers, stored_as = (
        layer_results(records, skeleton.blocks_path),
        skeleton.files.source.stored_as,
    )
    reconstruction = totals(result_of(record.results) for record in records)
    results = {
        "schema_version": RESULT_SCHEMA,
        "job": job,
        "text": dict(text),
        "source": source_name,
        # Of a source that is not in few bits the output has the very dtypes.
        **({"source_stored_as": stored_as} if stored_as else {}),
        "blocks": [_block_result(record) for record in records],
        "reconstruction": reconstruction,
        "layers": layers,
        "trained_norms": trained_norms(records, skeleton.blocks_path),
        "skipped_layers": list(skipped),
        "skipped_because": dict(skipped),
        "dense_weights": dict(dense),
        "few_tokens": few_tokens(layers, config.expert_tokens),
        "perplexity": perplexity,
        "weight_files": [file.to_json() for file in weight_files],
        "environment": {
            "prox24": VERSION,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _LIBRARIES},
        },
    }
    card = model_card(
        source_name=source_name,
        settings=card_settings(job, text) | {"reconstruct": config.reconstructs() and "block"},
        results=layers,
        skipped=skipped,
        perplexity=perplexity,
        dense=dense,
        license=source_license(skeleton.files.folder),
        stored_as=stored_as,
        reconstruction=reconstruction,
    )
    return card, json.dumps(results, indent=1) + "\n"


def _block_result(record: BlockRecord) -> dict[str, Any]:
    """A block's entry in `prox24.json`; `reconstruct`: see `pipeline.reconstruct.results`."""
    trained = result_of(record.results)
    return {
        "block": record.block,
        "relative_error": block_error(record),
        **({} if trained is None else {"reconstruct": trained}),
    }


def files_of_ranks(skeleton: Skeleton, world: int) -> list[list[str]]:
    """By rank: the source's weight files that it reads and rewrites, divided evenly by size."""
    sizes = {file: float(skeleton.files.size(file)) for file in skeleton.files.files}
    owners = deal(list(sizes), sizes, world)
    return [[file for file in sizes if owners[file] == rank] for rank in range(world)]


class Target(Protocol):
    """A place where an output is written, and the step that completes it."""

    place: Place

    def copy(self, skeleton: Skeleton, side_files: Mapping[str, str]) -> None:
        """Copies the source's side files. side_files: name → sha256."""
        ...

    def publish(self, card: str, results: str, stored: Sequence[StoredFile]) -> None:
        """Adds the model card and the results, which completes the output."""
        ...


@contextlib.contextmanager
def output_target(
    output: Place, run: RunDirectory, lock: RunLock, overwrite: bool
) -> Iterator[Target]:
    """Where the output is written: a temporary folder beside it, renamed when it is complete; in an
    object store the output itself, with `prox24.json` last."""
    if isinstance(output, ObjectFolder):
        yield _StoreTarget(output, run, lock)
    else:
        with _partial(output, run, lock) as partial:
            yield _FolderTarget(partial, output, lock, overwrite)


class _FolderTarget:
    """A temporary folder beside the output, renamed at the end."""

    def __init__(self, partial: Path, output: Path, lock: RunLock, overwrite: bool) -> None:
        self.place: Place = partial
        self._partial, self._output, self._lock, self._overwrite = partial, output, lock, overwrite

    def copy(self, skeleton: Skeleton, side_files: Mapping[str, str]) -> None:
        copy_side_files(skeleton.files, self._partial, side_files)

    def publish(self, card: str, results: str, stored: Sequence[StoredFile]) -> None:
        for name, text in (("README.md", card), (RESULT_FILE, results)):
            with write_new_file(self._partial / name) as writer:
                writer.write(text.encode("utf-8"))
        publish_output(self._partial, self._output, self._overwrite, self._lock.assert_held)


class _StoreTarget:
    """The output itself, in an object store."""

    def __init__(self, output: ObjectFolder, run: RunDirectory, lock: RunLock) -> None:
        self.place: Place = output
        self._output, self._lock = output, lock
        self._uploads = uploads_of(run, output, lock.assert_held)
        self._sent: list[str] = []
        self._uploads.begin(RESULT_FILE)

    def copy(self, skeleton: Skeleton, side_files: Mapping[str, str]) -> None:
        for name, raw in read_side_files(skeleton.files, side_files):
            self._send(name, raw)

    def publish(self, card: str, results: str, stored: Sequence[StoredFile]) -> None:
        self._send("README.md", card.encode("utf-8"))
        self._uploads.check([*self._sent, *(file.name for file in stored)])
        with self._output.upload(RESULT_FILE) as writer:
            writer.write(results.encode("utf-8"))
            self._lock.assert_held()

    def _send(self, name: str, raw: bytes) -> None:
        made_from = sha256_bytes(raw)
        self._uploads.send(name, made_from, lambda writer: writer.write(raw))
        self._sent.append(name)


def uploads_of(run: RunDirectory, output: ObjectFolder, guard: Guard) -> Uploads:
    """The objects of an output in an object store, and their records in the run directory."""
    return Uploads(run.uploads(), output, guard)


@contextlib.contextmanager
def _partial(output: Path, run: RunDirectory, lock: RunLock) -> Iterator[Path]:
    """A new folder beside `output` that only this owner of the run uses; deleted at the end."""
    partial = _beside(output, partial_prefix(output, run) + lock.nonce[:STAMP_DIGITS])
    make_directory(partial)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def recover(output: Place, run: RunDirectory, lock: RunLock) -> None:
    """Deletes or completes what former owners of the run left of an output on a disk."""
    if isinstance(output, Path):
        # First, so that a displaced owner can no longer rename its folder to the output.
        _discard_partials(output, run, lock)
        recover_output(output, lock.assert_held)


def forget_uploads(run: RunDirectory, output: Place, lock: RunLock) -> None:
    """Deletes the records of uploads to an object store, when the output is complete."""
    if isinstance(output, ObjectFolder):
        uploads_of(run, output, lock.assert_held).finish()


def _discard_partials(output: Path, run: RunDirectory, lock: RunLock) -> None:
    """Deletes the temporary folders of former owners of the run beside `output`.

    Each folder is renamed first, in one step: for a former owner that continues just before its
    last rename it is complete or gone, so that it never publishes a folder that is partly deleted.
    """
    prefix = partial_prefix(output, run)
    pattern = re.compile(re.escape(prefix) + f"[0-9a-f]{{{STAMP_DIGITS}}}")
    parent = _beside(output, prefix).parent
    if not parent.is_dir():
        return
    partials = [path for path in parent.iterdir() if pattern.fullmatch(path.name)]
    lock.assert_held()  # so none of those listed is a later owner's
    for path in partials:
        doomed = path.with_name(prefix + secrets.token_hex(STAMP_DIGITS // 2))
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, doomed)
        delete_folder(doomed)


def _beside(output: Path, name: str) -> Path:
    """A name beside the output itself, where `output` may be a link to it."""
    return Path(os.path.realpath(output)).with_name(name)


def partial_prefix(output: Path, run: RunDirectory) -> str:
    """Begins the names of this run's temporary folders beside `output`; see `recover`."""
    return f".{stem_of(output.name)}.partial-{stem_of(run.path.name)}-"


def layer_results(records: Sequence[BlockRecord], blocks_path: str) -> list[dict[str, Any]]:
    """One entry per pruned layer, in model order: names, shape, and the solve's report."""
    return [
        {
            "name": f"{blocks_path}.{record.block}.{name}",
            "block": record.block,
            "layer": name,
            "shape": list(layer.shape),
            "dtype": layer.dtype,
            **layer.results,
        }
        for record in records
        for name, layer in record.layers.items()
    ]


def trained_norms(records: Sequence[BlockRecord], blocks_path: str) -> list[str]:
    """The names in the model of the norms' weights and biases that were trained."""
    return [f"{blocks_path}.{record.block}.{norm}" for record in records for norm in record.norms]


def card_settings(job: dict[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The settings for the model card: the options, with the solver's settings resolved, what was
    read as the text, and the number of tokens that count where not all of them do."""
    return {
        **job["settings"],
        **job["solver"],
        "dataset": job["dataset"]["name"],
        "counted_tokens": text.get("counted_tokens"),
        "text_read": text_in_words(text) or None,
        # `auto` says less than what it came to, which is in the line above.
        "bos": None,
    }


def source_license(folder: Path) -> str | None:
    """The licence in the front matter of the source's model card, as written there; or None."""
    if not (folder / "README.md").is_file():
        return None
    try:
        lines = read_small(folder / "README.md").decode("utf-8").splitlines()
    except UnicodeDecodeError:
        return None
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            return None
        key, _, value = line.partition(":")
        if key == "license" and value.strip():
            return value.strip()
    return None
