"""A disk that is full, for each kind of file that a job writes; and room checked before it starts.

The disk is a tmpfs of the test's own, in a mount namespace of the process that runs the job; it is
filled just when the process opens the file in question: of a large one the first page still fits.
"""

from __future__ import annotations

import re
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline.records.inputs import read_inputs
from storage.errors import ResourceError
from storage.files.damage import damage
from storage.run.activations import read_tokens
from storage.run.checkpoints import read_block_record
from storage.run.directory import RunDirectory
from tests.support.damage import OPTIONS, Notes, Tiny
from tests.support.disks import Disk, fails, in_a_process

# What is written -> the path of the file, as it is opened, when the disk is full.
WRITERS = {
    "lock": r"run/\.lock-",
    "tokens": r"run/\.tokens\.arrow",
    "manifest": r"run/\.run\.json",
    "activation shard": r"activations/block-001/shard-00001",
    "shards record": r"activations/block-001/\.record",
    "times": r"report/\.inputs-001",
    "saved layer": r"layers/",
    "choices": r"choices/\.block-001",
    "row slices": r"checkpoints/block-001/rank-1",
    "block record": r"checkpoints/block-001/\.record",
    "summary": r"report/\.summary",
    "weight file": r"partial.*/\.model-00002",
    "side file": r"partial.*/\.tokenizer\.json",
    "card": r"partial.*/README",
    "results": r"partial.*/prox24\.json",
}
# The same of a job with --reconstruct.
TRAINED: dict[str, Any] = {"reconstruct": "block", "reconstruct_epochs": 1}
WRITERS_OF_TRAINED = {
    "target shard": r"targets/block-002/shard-00001",
    "targets record": r"targets/block-002/\.record",
    "solved record": r"checkpoints/block-001/\.solved",
    "trained slices": r"checkpoints/block-001/trained-1",
}
QUICK = {"activation shard", "row slices"}
LARGE = {
    "activation shard",
    "row slices",
    "weight file",
    "target shard",
    "trained slices",
}  # several pages: one still fits


def command(tiny: Tiny, folder: Path) -> list[str]:
    """`prox24 prune` with output and run directory in `folder`."""
    fixed = {"dataset": tiny.text, "executor": "local", "run_dir": folder / "run"}
    options = OPTIONS | fixed | tiny.options
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return ["prune", str(tiny.model), str(folder / "output"), *flags]


def check_whole(run: RunDirectory) -> None:
    """Whatever is committed is whole, and nothing else is left but attempts."""
    assert not list(run.path.rglob("*.tmp"))
    assert not list(run.path.glob("lock-*"))
    for block in run.committed_blocks():
        for file in read_block_record(run.record(block)).files:
            assert damage(run.checkpoints(block) / file.name, file, hashed=True) is None
    for chain in (run, run.targets()):
        for block in chain.committed_activations():
            for file in read_inputs(chain.activation_record(block)):
                assert damage(chain.activations(block) / file.name, file, hashed=True) is None
    if run.manifest.exists():
        read_tokens(run.tokens())


def full_disk(log: Path, tiny: Tiny, folder: Path, pattern: str, spare: int) -> None:
    from cluster.command_line import run

    disk = Disk(folder)
    disk.fill_when_opened(pattern, spare)
    message = fails(log, command(tiny, folder))
    path, _, rest = message.removeprefix("prox24: ").partition(": ")
    assert rest.startswith("not written, No space left on device; make room and run"), message
    assert re.search(pattern.replace(r"/\.", "/").removesuffix("-"), path), message
    assert not (folder / "output").exists()
    check_whole(RunDirectory(folder / "run"))
    disk.ballast.unlink()
    assert run(command(tiny, folder)) == 0
    tiny.check(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Large enough that files take several pages."""
    return Tiny.make(tmp_path_factory.mktemp("tiny"), hidden=32)


@pytest.mark.parametrize(
    "writer", [pytest.param(w, marks=() if w in QUICK else pytest.mark.slow) for w in WRITERS]
)
def test_a_full_disk(tiny: Tiny, tmp_path: Path, writer: str) -> None:
    """Exit code 2 and what to do; with room again the same command ends with the same bytes."""
    spare = 4096 if writer in LARGE else 0
    in_a_process(full_disk, tmp_path / "log", tiny, tmp_path / "disk", WRITERS[writer], spare)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny.make(tmp_path_factory.mktemp("trained"), hidden=32, **TRAINED)


@pytest.mark.parametrize(
    "writer",
    [
        pytest.param(w, marks=() if w == "trained slices" else pytest.mark.slow)
        for w in WRITERS_OF_TRAINED
    ],
)
def test_a_full_disk_in_a_reconstruction(trained: Tiny, tmp_path: Path, writer: str) -> None:
    spare, pattern = 4096 if writer in LARGE else 0, WRITERS_OF_TRAINED[writer]
    in_a_process(full_disk, tmp_path / "log", trained, tmp_path / "disk", pattern, spare)


def limited_files(log: Path, tiny: Tiny, folder: Path) -> None:
    from cluster.command_line import run

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, unlimited[1]))
    message = fails(log, command(tiny, folder))
    assert "not written, File too large; raise the limit on the size of a file" in message
    assert "/run/" in message
    check_whole(RunDirectory(folder / "run"))
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert run(command(tiny, folder)) == 0
    tiny.check(folder)


def test_a_limit_on_the_size_of_files(tiny: Tiny, tmp_path: Path) -> None:
    """As `ulimit -f` sets it: needs no right to mount."""
    folder = tmp_path / "job"
    folder.mkdir()
    in_a_process(limited_files, tmp_path / "log", tiny, folder)


def too_small(log: Path, tiny: Tiny, folder: Path) -> None:
    Disk(folder, 60 << 20)
    message = fails(log, command(tiny, folder))
    assert re.search(r"the job needs about 0\.07 GB of disk, 0\.06 GB are free; make room", message)
    assert not any(folder.iterdir())


def test_a_disk_that_is_too_small_is_refused_before_the_start(tiny: Tiny, tmp_path: Path) -> None:
    in_a_process(too_small, tmp_path / "log", tiny, tmp_path / "disk")


def too_small_for_the_output(log: Path, tiny: Tiny, folder: Path) -> None:
    Disk(folder, 64 << 10)
    arguments = command(tiny, folder.parent)
    arguments[2] = str(folder / "deep" / "output")
    message = fails(log, arguments)
    assert message.startswith(f"prox24: {folder}: the job needs")
    assert not any(folder.iterdir())
    assert not (folder.parent / "run").exists()


def test_an_output_on_another_disk_is_checked_too(tiny: Tiny, tmp_path: Path) -> None:
    in_a_process(too_small_for_the_output, tmp_path / "log", tiny, tmp_path / "disk")


class Filling(Notes):
    """Fills the disk when a phase begins."""

    def __init__(self, disk: Disk, when: tuple[str, int]) -> None:
        super().__init__()
        self.disk, self.when = disk, when

    def phase(self, name: str, block: int | None = None) -> None:
        if (name, block) == self.when:
            self.disk.fill()


def full_on_ray(log: Path, tiny: Tiny, folder: Path) -> None:
    from cluster.dispatch.ray_executor import RayExecutor
    from pipeline.config.prune import PruneConfig

    disk = Disk(folder)
    config = PruneConfig(dataset=str(tiny.text), **OPTIONS)
    for when in (("propagate", 0), ("solve", 1)):
        with pytest.raises(ResourceError, match="not written, No space left") as caught:
            tiny.prune(folder, Filling(disk, when), RayExecutor(config))
        assert f"/block-00{1}/" in str(caught.value)
        check_whole(RunDirectory(folder / "run"))
        disk.ballast.unlink()
    tiny.prune(folder, executor=RayExecutor(config))
    tiny.check(folder)


@pytest.mark.slow
def test_on_ray(tiny: Tiny, tmp_path: Path) -> None:
    """What a worker finds reaches the user as the same message."""
    in_a_process(full_on_ray, tmp_path / "log", tiny, tmp_path / "disk")
