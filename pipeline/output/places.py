"""Checks, before anything is computed, that the folders of a job can be what they are to be."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.config.prune import PruneConfig
from pipeline.output.write import RESULT_FILE, partial_prefix, uploads_of
from storage.errors import ConfigError, OutputError, RunDirectoryError
from storage.files.names import absolute_path
from storage.files.temporary import temporary_name
from storage.files.trial import refusing, try_folder, try_replacing
from storage.model.files import ModelFiles
from storage.object_store import ObjectFolder, Place, lies_in, resolved
from storage.output.uploads import PROBE, require_writable
from storage.output.weight_files import name_aside, side_files
from storage.run.directory import SCRATCH_PREFIX, RunDirectory
from storage.run.lock import RunLock

# As long as the longest names in a run directory: activations/block-000000000/shard-...
_LONGEST_IN_RUN = f"{'x' * 11}/{'x' * 15}/{'x' * 100}"


def run_directory_of(output: Place, config: PruneConfig) -> Path:
    """`--run-dir`, or OUTPUT with `.run` appended; absolute, since workers may run elsewhere.

    Raises `ConfigError` where it would lie in an object store, `OutputError` for the root.
    """
    if config.run_dir is not None:
        return absolute_path(config.run_dir)
    if isinstance(output, ObjectFolder):
        raise ConfigError(f"{output} cannot hold the job's state: name a folder with --run-dir")
    output = absolute_path(output)
    if not output.name:
        raise OutputError(f"OUTPUT {output} is the root of the file system; name a folder in it")
    return output.with_name(output.name + ".run")


def check_apart(source: Place, output: Place, run: Path, config: PruneConfig) -> None:
    """Raises `OutputError` if one of a job's folders lies in another that is written to."""
    asked = output
    source, output, run = resolved(source), resolved(output), Path(os.path.realpath(run))
    if isinstance(output, Path) and lies_in(Path(os.path.realpath(os.getcwd())), output):
        raise OutputError(
            f"OUTPUT {asked} is or holds the current folder, which cannot be replaced; name a "
            "folder in it, or start from another one"
        )
    if lies_in(source, output):
        raise OutputError(f"{output} holds the source model; choose another OUTPUT")
    if lies_in(output, source):
        raise OutputError(f"OUTPUT {asked} lies in the source model; choose another OUTPUT")
    if lies_in(run, output) or lies_in(output, run) or lies_in(source, run) or lies_in(run, source):
        raise OutputError(
            f"{run} cannot be the run directory of a job from {source} to {output}: one would lie "
            "in the other; choose another --run-dir"
        )
    for option, path in _written_here(config).items():
        if path is not None and lies_in(Path(os.path.realpath(path)), output):
            raise OutputError(
                f"{option} {path} lies in OUTPUT, which appears at the end; name another place"
            )


def _written_here(config: PruneConfig) -> dict[str, str | None]:
    """Option → what the job writes on this machine besides its output and its state."""
    scratch = config.scratch_dir
    literal = scratch is not None and scratch.startswith("/") and "$" not in scratch
    return {"--trace": config.trace, "--scratch-dir": scratch if literal else None}


def check_run_directory(run: RunDirectory, config: PruneConfig) -> None:
    """Raises `RunDirectoryError` where the job's state could not be written there.

    A new one is made and removed again.
    """
    if config.run_dir is not None:
        what, remedy = "--run-dir", "choose another one"
    else:
        what, remedy = "the run directory of OUTPUT,", "choose another OUTPUT, or a --run-dir"
    with refusing(what, run.path, remedy, RunDirectoryError):
        try:
            try_folder(run.path, SCRATCH_PREFIX, [_LONGEST_IN_RUN])
            for folder in _folders_of(run):
                temporary = temporary_name(folder / "x")
                temporary.touch(exist_ok=False)
                temporary.unlink()
        except FileNotFoundError:
            if not run.path.is_dir():
                raise
            # A live owner, or the next one, has just swept it: it can write there.


def _folders_of(run: RunDirectory) -> list[Path]:
    """The folders that an earlier run of the job has left; perhaps by another user."""
    return [Path(folder) for folder, _, _ in os.walk(run.path)][1:]


def check_output(
    output: Place, run: RunDirectory, lock: RunLock, overwrite: bool, source: ModelFiles
) -> None:
    """Raises `OutputError` if `output` has files already and `overwrite` is False, or where it
    could not be written: that is tried, beside it.

    Objects that this run has begun to write to an object store do not count. Raises `ResourceError`
    if the store refuses a write, or for a full disk. Only for the owner of the run.
    """
    if isinstance(output, ObjectFolder):
        objects = output.files().keys() - {PROBE}
        complete = RESULT_FILE in objects
        if objects and not overwrite and (complete or not uploads_of(run, output, None).begun()):
            raise OutputError(f"{output} exists and is not empty; --overwrite replaces it")
        require_writable(output)
        return
    with refusing("OUTPUT", output, "choose another OUTPUT"):
        if output.exists() and not output.is_dir():
            raise OutputError(f"{output} is a file; name a folder that does not exist yet")
        if output.is_dir() and any(output.iterdir()) and not overwrite:
            raise OutputError(f"{output} exists and is not empty; --overwrite replaces it")
        real = Path(os.path.realpath(output))
        longest = "x" * max(map(_written_bytes, [*side_files(source), *source.files]))
        try_folder(real.parent, partial_prefix(output, run), [longest], final=real.name)
        if real.is_dir():
            try_replacing(real, name_aside(real), lock.assert_held)


def _written_bytes(name: str) -> int:
    """The length of the longest name that a file of the output has while it is written."""
    path = Path(name)
    return max(len(os.fsencode(each.name)) for each in (path, temporary_name(path)))
