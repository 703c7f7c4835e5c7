"""What all nodes must see alike: the model, the run directory, the folder of the output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.formats.open_model import open_model
from pipeline.messages import Job
from pipeline.output.write import partial_prefix
from pipeline.preflight.disk import existing
from storage.errors import InputError
from storage.object_store import Place, place
from storage.run.directory import SCRATCH_PREFIX, RunDirectory
from storage.run.shared_folders import Marked, SharedFolder, answer


def folders_of(run: RunDirectory, output: Place) -> tuple[SharedFolder, ...]:
    """What a job writes to on every node: its run directory, and where OUTPUT comes to be.

    An object store needs no marker: it is the same one for all who reach it.
    """
    folders = [SharedFolder("the run directory (--run-dir)", str(run.path), SCRATCH_PREFIX)]
    if isinstance(output, Path):
        prefix = partial_prefix(output, run)
        folders.append(SharedFolder("the folder of OUTPUT", str(existing(output)), prefix))
    return tuple(folders)


def scratch_of(run: RunDirectory) -> tuple[SharedFolder, ...]:
    """What an evaluation alone writes to."""
    return (SharedFolder("the scratch folder (--scratch-dir)", str(run.path), SCRATCH_PREFIX),)


def complaints(job: Job, marks: Sequence[Marked], rank: int) -> list[str]:
    """What this rank's node does not see as the driver does, in words; run before anything else.

    The model may be another copy at the same path: its config, headers and sizes are compared here,
    and its weights by their hashes when they are first read.
    """
    found = answer(marks, rank)
    if job.source_identity is None:
        return found
    try:
        same = open_model(place(job.source)).identity() == job.source_identity
    except (InputError, OSError) as error:
        return [f"does not see MODEL, {job.source} ({error})", *found]
    return found if same else [f"has another model at MODEL, {job.source}", *found]
