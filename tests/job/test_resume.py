"""Jobs that are killed and go on: real drivers, real signals, and the same bytes in the end."""

from __future__ import annotations

import random
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from storage.errors import CorruptFileError, DataError, RunDirectoryError
from tests.support.jobs import check_output, contents, prune_here, tensors, write_text
from tests.support.processes import Driver, until
from tests.support.tiny_models import save_tiny_model

BLOCKS = 6
OPTIONS = {
    "nsamples": 8, "seqlen": 32, "batch_size": 2, "threads": 1, "workers": 2, "reconstruct": "auto",
}  # fmt: skip

Source = tuple[Path, Path, dict[str, bytes]]


class Bench:
    """A model, a text, the output of the uninterrupted job, and drivers of interrupted ones."""

    def __init__(self, folder: Path, model: Path, text: Path, expected: dict[str, bytes]) -> None:
        self.folder, self.model, self.text, self.expected = folder, model, text, expected
        self.output = folder / "output"
        self.run = folder / "output.run"
        self.drivers: list[Driver] = []

    def start(self, *more: str, **changed: Any) -> Driver:
        """A driver on this job; `changed` are options with other values, `more` further ones."""
        options = {"dataset": self.text, "executor": "local"} | OPTIONS | changed
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        log = self.folder / f"log-{len(self.drivers)}"
        self.drivers.append(Driver(["prune", self.model, self.output, *arguments, *more], log))
        return self.drivers[-1]

    def start_until(self, path: str, *more: str, **changed: Any) -> Driver:
        """A driver that runs until a file of that pattern appears (or, missing it, its end)."""
        driver = self.start(*more, **changed)
        until(lambda: any(self.folder.glob(path)) or not driver.running, path)
        return driver

    def finish(self, *more: str, **changed: Any) -> Driver:
        """Runs the job to its end, and compares its output with the uninterrupted job's."""
        driver = self.start(*more, **changed)
        assert driver.wait() == 0, driver.errors()
        self.check()
        return driver

    def check(self) -> None:
        found = contents(self.output)
        assert found.keys() == self.expected.keys()
        assert [name for name in found if found[name] != self.expected[name]] == []
        assert not list(self.folder.glob(".*")), "something is left beside the output"

    def records(self) -> dict[str, tuple[int, int, bytes]]:
        """Committed blocks: inode, time of writing, and contents of their records."""
        found = {}
        for path in sorted(self.run.glob("checkpoints/*/record.json")):
            stat = path.stat()
            found[path.parent.name] = (stat.st_ino, stat.st_mtime_ns, path.read_bytes())
        return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("resume")
    model = save_tiny_model(folder / "model", blocks=BLOCKS, weight_files=3)
    text = write_text(folder / "text.txt")
    whole = prune_here(model, folder / "output", dataset=str(text), **OPTIONS)
    return model, text, contents(whole.output)


@pytest.fixture
def bench(source: Source, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, *source)
    yield bench
    for driver in bench.drivers:
        driver.end()


# Where a driver is killed: when the first file of that pattern is there. Every single point, with a
# smaller job: `test_kill_matrix.py`.
KILL_POINTS = [
    "output.run/activations/block-003/record.json",
    ".output.partial-*/model-00002*",
]
MORE_KILL_POINTS = [
    "output.run/tokens.arrow",
    "output.run/activations/block-000/*.arrow",
    "output.run/checkpoints/block-000/rank-0.*",
    "output.run/checkpoints/block-000/record.json",
    "output",
    "output.run/lock*",
    "output.run/run.json",
    "output.run/activations/block-000/record.json",
    "output.run/activations/block-003/*.arrow",
    "output.run/checkpoints/block-003/rank-1.*",
    "output.run/checkpoints/block-005/record.json",
    ".output.partial-*",
    ".output.partial-*/model-00003*",
    ".output.partial-*/config.json",
    ".output.partial-*/prox24.json",
]


def slow(values: list[Any]) -> list[Any]:
    """Values of a parameter for `make test-slow` only."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("point", KILL_POINTS + slow(MORE_KILL_POINTS))
def test_killed_when_a_file_appears(bench: Bench, point: str) -> None:
    """SIGKILL, and the same command again at once."""
    driver = bench.start_until(point)
    driver.send(signal.SIGKILL)
    assert driver.wait() in (-signal.SIGKILL, 0), driver.errors()
    done, whole = len(bench.records()), bench.output.exists()
    again = bench.finish()
    if done and not whole:
        assert f"{done} of {BLOCKS} blocks are already done" in again.errors()


@pytest.mark.parametrize("seed", [0, *slow(list(range(1, 10)))])
def test_killed_at_random_again_and_again(bench: Bench, seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(3):
        driver = bench.start()
        time.sleep(generator.uniform(0.05, 1.5))
        driver.send(signal.SIGKILL)
        assert driver.wait() in (-signal.SIGKILL, 0), driver.errors()
    bench.finish()


def test_committed_blocks_are_not_redone(bench: Bench) -> None:
    first = bench.start_until("output.run/checkpoints/block-002/record.json")
    first.send(signal.SIGKILL)
    first.wait()
    before = bench.records()
    assert {"block-000", "block-001", "block-002"} <= before.keys()
    second = bench.start_until("output.run/checkpoints/block-004/record.json")
    second.send(signal.SIGKILL)
    second.wait()
    after = bench.records()
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    third = bench.finish()
    lines = [line for line in third.errors().splitlines() if line.startswith("block ")]
    assert len(lines) == BLOCKS - len(after)


def test_what_is_chosen_at_run_time_is_chosen_once(bench: Bench) -> None:
    """With --shrinkage auto; the reference is a job of the same settings, never interrupted."""
    (bench.folder / "whole").mkdir()
    options: dict[str, Any] = OPTIONS | {"dataset": str(bench.text), "shrinkage": "auto"}
    bench.expected = contents(
        prune_here(bench.model, bench.folder / "whole" / "output", **options).output
    )
    driver = bench.start_until("output.run/choices/block-002.json", shrinkage="auto")
    driver.send(signal.SIGKILL)
    driver.wait()
    bench.finish(shrinkage="auto")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_on_request(bench: Bench, number: signal.Signals) -> None:
    """Exit code 130, no process left, and the command to go on with."""
    driver = bench.start_until("output.run/checkpoints/block-001/record.json")
    driver.send(number)
    assert driver.wait() == 130
    assert driver.session() == []
    assert not list(bench.run.glob("lock*"))
    lines = driver.errors().splitlines()
    assert f"prox24: stopped by {number.name}" in lines
    assert "Traceback" not in driver.errors()
    assert len(bench.records()) >= 2
    assert not bench.output.exists()
    command = shlex.split(next(line for line in lines if "go on with:" in line))
    resumed = Driver(command[command.index("prox24", 1) + 1 :], bench.folder / "resumed")
    bench.drivers.append(resumed)
    assert resumed.wait() == 0, resumed.errors()
    bench.check()


def test_a_second_driver_is_refused_while_the_first_lives(bench: Bench) -> None:
    first = bench.start_until("output.run/checkpoints/block-000/record.json")
    first.send(signal.SIGSTOP)  # alive, whatever it would do in the meantime
    second = bench.start()
    assert second.wait() == 2
    assert str(first.pid) in second.errors()
    assert "Traceback" not in second.errors()
    first.send(signal.SIGCONT)
    assert first.wait() == 0
    bench.check()


def test_an_overwritten_output_stays_until_the_new_one_is_whole(bench: Bench) -> None:
    bench.output.mkdir()
    (bench.output / "old.txt").write_text("precious")
    refused = bench.start()
    assert refused.wait() == 2
    assert "--overwrite" in refused.errors()
    assert not bench.run.exists()
    driver = bench.start_until(".output.partial-*/model-00001*", "--overwrite")
    driver.send(signal.SIGKILL)
    if driver.wait() == -signal.SIGKILL:
        assert contents(bench.output) == {"old.txt": b"precious"}
    bench.finish("--overwrite")


def test_the_command_of_a_finished_job(bench: Bench) -> None:
    """It does nothing, refuses an output that is not its own, and replaces one that is gone."""
    bench.finish()
    before = {path: path.stat().st_ino for path in bench.output.iterdir()}
    again = bench.finish()
    assert {path: path.stat().st_ino for path in bench.output.iterdir()} == before
    assert "block 1/" not in again.errors()
    results = bench.output / "prox24.json"
    results.write_text(results.read_text().replace('"prox_admm"', '"wanda"'))
    refused = bench.start()
    assert refused.wait() == 2
    assert "not empty" in refused.errors()
    shutil.rmtree(bench.output)
    bench.finish()


# -- run directories that are not as they were, or another job's ---------------------------------


@pytest.fixture(scope="module")
def begun(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a job that was killed after its fourth block."""
    bench = Bench(tmp_path_factory.mktemp("begun"), *source)
    driver = bench.start_until("output.run/checkpoints/block-003/record.json")
    driver.send(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    return bench.run


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    """A copy of it, without the dead owner's lock and what it was writing when it died.

    The next driver sweeps both away, and some of these tests ask that nothing else changes.
    """
    left = shutil.ignore_patterns("lock*", ".*.tmp")
    return Path(shutil.copytree(begun, tmp_path / "run", ignore=left))


def go_on(source: Source, run: Path, **changed: Any) -> Path:
    """Goes on with the job in `run`, in this process; the output."""
    model, text, _ = source
    options: dict[str, Any] = OPTIONS | {"dataset": str(text), "run_dir": str(run)} | changed
    return prune_here(options.pop("model", model), run.parent / "output", **options).output


def test_lost_activations_are_made_again(source: Source, run: Path) -> None:
    shutil.rmtree(run / "activations")
    assert contents(go_on(source, run)) == source[2]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"nsamples": 4}, "nsamples: 8 there, 4 here"),
        ({"seqlen": 16}, "seqlen: 32 there, 16 here"),
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"damping": 0.1}, "solver.damping: "),
        ({"method": "wanda"}, 'method: "prox_admm" there, "wanda" here'),
        ({"pattern": "4:8"}, 'pattern: "2:4" there, "4:8" here'),
        ({"batch_size": 4}, "batch_size: 2 there, 4 here"),
        ({"dtype": "bfloat16"}, 'dtype: "float32" there, "bfloat16" here'),
        ({"dataset": "text"}, "dataset.sha256"),
        ({"model": "layout"}, "source"),
        ({"model": "weights"}, "model-00002-of-00003.safetensors"),
    ],
)
def test_another_job_is_refused(
    source: Source, run: Path, changed: dict[str, Any], named: str
) -> None:
    """The message names what differs, and nothing of the directory is lost."""
    model, text, _ = source
    if changed.get("dataset"):
        changed = {"dataset": str(write_text(run.parent / text.name, seed=1))}
    if kind := changed.get("model"):
        changed = {"model": other_model(model, run.parent / "model", kind)}
    before = contents(run)
    with pytest.raises(RunDirectoryError) as caught:
        go_on(source, run, **changed)
    assert named in str(caught.value)
    assert str(run) in str(caught.value)
    if named.startswith("model-"):  # found by workers, when files of dead attempts are swept
        before = {name: raw for name, raw in before.items() if name in contents(run)}
        before["status.json"] = contents(run)["status.json"]  # says that the job was refused
    assert contents(run) == before
    assert not (run.parent / "output").exists()


def other_model(source: Path, folder: Path, kind: str) -> Path:
    """A copy with another number of blocks, or with one bit of one weight changed."""
    if kind == "layout":
        return save_tiny_model(folder, blocks=BLOCKS - 1, weight_files=3)
    shutil.copytree(source, folder)
    path = folder / "model-00002-of-00003.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(torch.int32).view(-1)[0] ^= 1
    save_file(weights, path, {"format": "pt"})
    assert [n for n, _ in tensors(folder)] == [n for n, _ in tensors(source)]
    return folder


def test_placement_may_change(source: Source, run: Path) -> None:
    """Another number of workers goes on with the job; the text may have moved."""
    model, text, expected = source
    (run.parent / "elsewhere").mkdir()
    moved = shutil.copy(text, run.parent / "elsewhere")
    output = go_on(source, run, workers=3, dataset=str(moved))
    check_output(model, output)
    assert contents(output).keys() == expected.keys()


def test_a_folder_of_something_else_is_no_run_directory(source: Source, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"schema_version": 99}')
    with pytest.raises((RunDirectoryError, CorruptFileError), match=r"run\.json"):
        go_on(source, run)


def test_a_check_that_fails_leaves_nothing_behind(source: Source, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="10000"):
        go_on(source, tmp_path / "run", nsamples=10_000)
    assert list(tmp_path.iterdir()) == []
