"""Folders that all nodes must see: the model, the run directory, the folder of the output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.formats.open_model import open_model
from pipeline.messages import Job
from pipeline.output.write import partial_prefix
from pipeline.preflight.disk import existing
from storage.errors import InputError
from storage.files.os_errors import file_error
from storage.object_store import Place, place
from storage.run.directory import SCRATCH_PREFIX, RunDirectory
from storage.run.shared_folders import Marked, SharedFolder, answer


def folders_of(run: RunDirectory, output: Place) -> tuple[SharedFolder, ...]:
    """The folders that a job writes to from every node: its run directory, and that of OUTPUT.

    An object store is not checked: it is the same for every node that reaches it.
    """
    folders = [SharedFolder("the run directory (--run-dir)", str(run.path), SCRATCH_PREFIX)]
    if isinstance(output, Path):
        prefix = partial_prefix(output, run)
        folders.append(SharedFolder("the folder of OUTPUT", str(existing(output)), prefix))
    return tuple(folders)


def scratch_of(run: RunDirectory) -> tuple[SharedFolder, ...]:
    """The folder that `prox24 eval` writes to from every node."""
    return (SharedFolder("the scratch folder (--scratch-dir)", str(run.path), SCRATCH_PREFIX),)


def what_is_not_seen(job: Job, marks: Sequence[Marked], rank: int) -> list[str]:
    """What the node of this worker does not see as the driver does, as phrases; empty if nothing.

    Runs before anything else. The model may be a copy at the same path: its config, headers and
    file sizes are compared here, the hashes of its weights when they are first read.
    """
    problems = answer(marks, rank)
    if job.source_identity is None:
        return problems
    try:
        same = open_model(place(job.source)).identity() == job.source_identity
    except (InputError, OSError) as error:
        return [f"does not see MODEL, {job.source} ({file_error(error) or error})", *problems]
    return problems if same else [f"has another model at MODEL, {job.source}", *problems]
