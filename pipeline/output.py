"""The finished model's folder: weight files by the workers, the rest by the driver, then a rename.

Nothing in it depends on when, where or how often the job was interrupted: the same job gives the
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.config import PruneConfig
from pipeline.loop import STAMP_DIGITS, block_error
from pipeline.model import Skeleton
from pipeline.model_card import model_card
from pipeline.version import VERSION
from storage.checkpoints import BlockRecord
from storage.commit import StoredFile, make_directory, write_new_file
from storage.lock import RunLock
from storage.output import copy_side_files, publish_output
from storage.run_directory import RunDirectory

RESULT_FILE = "prox24.json"
RESULT_SCHEMA = 1
_LIBRARIES = ("torch", "transformers", "safetensors", "pyarrow")


def finished_output(output: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """The results in OUTPUT if it is this very job's finished output, else None."""
    try:
        results = json.loads((output / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if isinstance(results, dict) and results.get("job") == json.loads(json.dumps(job)):
        return results
    return None


def write_output(
    output: Path,
    *,
    job: dict[str, Any],
    skeleton: Skeleton,
    config: PruneConfig,
    skipped: Sequence[str],
    source_name: str,
    run: RunDirectory,
    lock: RunLock,
    side_files: Mapping[str, str],
    write_files: Callable[[str], tuple[list[StoredFile], list[BlockRecord]]],
    evaluate: Callable[[Path], dict[str, Any] | None],
) -> None:
    """Writes the folder beside `output` under a name no reader trusts, then renames it.

    `write_files(folder)` has the workers write the weight files and returns what they wrote, and
    the blocks' records that it was made from; `side_files` are the hashes of what is copied;
    `evaluate(folder)` then measures the model's perplexity, or gives None.
    """
    with _partial(output, run, lock) as partial:
        stored, records = write_files(str(partial))
        stored.sort(key=lambda file: file.name)
        copy_side_files(skeleton.files, partial, side_files)
        perplexity = evaluate(partial)
        layers = layer_results(records, skeleton.blocks_path)
        results = {
            "schema_version": RESULT_SCHEMA,
            "job": job,
            "source": source_name,
            "blocks": [
                {"block": record.block, "relative_error": block_error(record)} for record in records
            ],
            "layers": layers,
            "skipped_layers": list(skipped),
            "perplexity": perplexity,
            "weight_files": [file.to_json() for file in stored],
            "environment": {
                "prox24": VERSION,
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in _LIBRARIES},
            },
        }
        card = model_card(
            source_name=source_name,
            settings=card_settings(job),
            results=layers,
            perplexity=perplexity,
            license=source_license(skeleton.files.folder),
        )
        _write(partial / "README.md", card)
        _write(partial / RESULT_FILE, json.dumps(results, indent=1) + "\n")
        publish_output(partial, output, config.overwrite, lock.assert_held)


@contextlib.contextmanager
def _partial(output: Path, run: RunDirectory, lock: RunLock) -> Iterator[Path]:
    """A new folder beside `output`, of this owner of the run alone; gone in the end."""
    partial = output.with_name(_partial_prefix(output, run) + lock.nonce[:STAMP_DIGITS])
    make_directory(partial)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def discard_partials(output: Path, run: RunDirectory, lock: RunLock) -> None:
    """Deletes what former owners of the run were writing beside `output`.

    Each folder is renamed first, in one step: a former owner that wakes up just before its last
    rename finds it whole or not at all, and never publishes a folder that is half deleted.
    """
    prefix = _partial_prefix(output, run)
    pattern = re.compile(re.escape(prefix) + f"[0-9a-f]{{{STAMP_DIGITS}}}")
    if not output.parent.is_dir():
        return
    found = [path for path in output.parent.iterdir() if pattern.fullmatch(path.name)]
    lock.assert_held()  # so those listed are older than any later owner's
    for path in found:
        doomed = path.with_name(prefix + secrets.token_hex(STAMP_DIGITS // 2))
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _partial_prefix(output: Path, run: RunDirectory) -> str:
    return f".{output.name}.partial-{run.path.name}-"


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


def card_settings(job: dict[str, Any]) -> dict[str, Any]:
    """The settings that the model card shows: the options, with the solver's as resolved."""
    return {**job["settings"], **job["solver"], "dataset": job["dataset"]["name"]}


def source_license(folder: Path) -> str | None:
    """The licence that the source's model card declares in its front matter, if any."""
    try:
        lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
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


def _write(path: Path, text: str) -> None:
    with write_new_file(path) as writer:
        writer.write(text.encode("utf-8"))
