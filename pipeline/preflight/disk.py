"""The disk space that a job needs, compared with what is free before it starts."""

from __future__ import annotations

import fnmatch
import os
import shutil
import tempfile
from pathlib import Path

from pipeline.config.evaluate import EvalConfig
from pipeline.config.prune import PruneConfig
from pipeline.models.selection import layers_to_prune
from pipeline.models.skeleton import Skeleton
from pipeline.solvers.registry import solver_for
from storage.errors import ResourceError
from storage.object_store import Place
from storage.output.weight_files import side_files
from storage.run.directory import RunDirectory

# Bytes of records, tokens and reports.
_SLACK_BYTES = 64 << 20


def check_job_space(
    run: RunDirectory,
    output: Place,
    skeleton: Skeleton,
    config: PruneConfig,
    evaluation_sequences: int,
) -> None:
    """Compares what the job will write with what is free, for each filesystem.

    At any time there are at most: two activation stores (a repair deletes the current one where a
    third would not fit), three with the targets of a reconstruction; the row slices of all blocks,
    and of one block that is redone or reconstructed; the saved layers; the output. At the end, when
    the activation stores of the calibration are deleted, the evaluation of `evaluation_sequences`
    sequences has two stores. What an interrupted job has left in the run directory counts as free:
    the job resumes from it, or deletes it.
    Raises `ResourceError` where there is too little space.
    """
    store = 0
    needs = {solver_for(settings).needs for settings in config.layer_rules().all_settings()}
    if needs != {"none"} or config.save_layers or config.reconstructs():
        store = activation_bytes(skeleton, config.nsamples, config.seqlen)
    evaluation, measured = config.evaluation(), 0
    if evaluation is not None:
        measured = activation_bytes(skeleton, evaluation_sequences, evaluation.seqlen)
    here = store if config.scratch_dir is None else 0  # else workers check their node's scratch
    stores = max((3 if config.reconstructs() else 2) * here, 2 * measured)
    size = _checkpoint_bytes(skeleton, config) + stores + _SLACK_BYTES
    uses = [(run.path, size, run.size())]
    if isinstance(output, Path):
        uses.append((existing(output), _output_bytes(skeleton), 0))
    _require(uses)


def check_evaluation_space(config: EvalConfig, skeleton: Skeleton, sequences: int) -> None:
    """The same for `prox24 eval`, which has two activation stores in its scratch folder."""
    store = activation_bytes(skeleton, sequences, config.seqlen)
    scratch = Path(config.scratch_dir or tempfile.gettempdir()).absolute()
    _require([(scratch, 2 * store + _SLACK_BYTES, 0)])


def activation_bytes(skeleton: Skeleton, sequences: int, seqlen: int) -> int:
    """Bytes of one activation store."""
    hidden = int(skeleton.model.config.get_text_config().hidden_size)
    return sequences * seqlen * hidden * skeleton.dtype.itemsize


def existing(path: Path) -> Path:
    """The nearest existing folder above `path`, links followed: `path` will be on its disk."""
    return next(parent for parent in Path(os.path.realpath(path)).parents if parent.is_dir())


def _checkpoint_bytes(skeleton: Skeleton, config: PruneConfig) -> int:
    """Bytes of the row slices of all blocks, of those of the largest again, and of saved layers."""
    rules = config.layer_rules()
    blocks, saved = [0], 0
    for block in range(len(skeleton.blocks)):
        size = 0
        for layer, (_, columns) in layers_to_prune(skeleton, block, rules).items():
            stored = skeleton.stored_bytes(block, layer)
            size += stored
            name = f"{skeleton.block_prefix(block)}{layer}"
            if config.save_layers and fnmatch.fnmatchcase(name, config.save_layers):
                saved += stored + 4 * columns * columns
        blocks.append(size)
    return sum(blocks) + max(blocks) + saved


def _output_bytes(skeleton: Skeleton) -> int:
    files = skeleton.files
    sides = sum((files.folder / name).stat().st_size for name in side_files(files))
    return sides + sum(files.size(file) for file in files.files)


def _device(path: Path) -> int:
    return os.stat(path).st_dev


def _require(uses: list[tuple[Path, int, int]]) -> None:
    """Raises `ResourceError` for a filesystem with too little space.

    uses: a folder, the bytes to be written to it, and the bytes in it that count as free.
    """
    by_device: dict[int, list[tuple[Path, int, int]]] = {}
    for use in uses:
        by_device.setdefault(_device(use[0]), []).append(use)
    for same in by_device.values():
        path, size = same[0][0], sum(use[1] for use in same)
        free = shutil.disk_usage(path).free + sum(use[2] for use in same)
        if free < size:
            raise ResourceError(
                f"{path}: the job needs about {size / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are "
                "free; make room, choose another --run-dir, or lower --nsamples or --seqlen"
            )
