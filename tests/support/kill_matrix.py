"""A tiny job that is killed at any of its commit points, resumed, and compared byte for byte."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.files.commit import read_json, verify_file
from storage.files.hashing import StoredFile
from storage.run.checkpoints import read_block_record, verify_record
from storage.run.directory import RunDirectory
from tests.support.injection import Injection
from tests.support.jobs import contents, write_text
from tests.support.processes import Driver
from tests.support.tiny_models import save_tiny_model

# Two blocks, two ranks, two weight files: everything that happens more than once happens twice.
# A later `--reconstruct=block` wins.
OPTIONS = (
    *("--nsamples=4", "--seqlen=16", "--batch-size=2", "--threads=1", "--workers=2"),
    "--reconstruct=none",
)


def save_dense(folder: Path) -> Path:
    """The plain job's model."""
    return save_tiny_model(folder, blocks=2, hidden=16, intermediate=32, weight_files=2)


@dataclass
class Matrix:
    """The job, what it leaves when nothing disturbs it, and the points that it passes.

    more: options beyond, or instead of, OPTIONS. old: files of a folder where the output goes.
    save: makes the model, of two blocks in two weight files. within: see `Driver`.
    """

    folder: Path
    more: Sequence[str] = ("--executor=local", "--no-report")
    old: dict[str, bytes] = field(default_factory=dict)
    save: Callable[[Path], Path] = save_dense
    within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.model = self.save(self.folder / "model")
        self.text = write_text(self.folder / "text.txt", 2048)
        names = self.folder / "points"
        whole = Case(self)
        assert whole.run(Injection(whole.folder, names=names)) == 0, whole.errors()
        self.points = names.read_text().splitlines()
        self.output, self.left = contents(whole.output), contents(whole.run_directory)
        assert set(whole.folder.iterdir()) == {whole.output, whole.run_directory}

    def spread(self, wanted: int) -> list[int]:
        """Numbers of `wanted` points, the same distance apart, that leave out neither end."""
        last = len(self.points) - 1
        return sorted({round(i * last / (wanted - 1)) for i in range(wanted)})


class Case:
    """One interrupted job of a matrix, in a folder of its own."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix, self.number = matrix, next(matrix.numbers)
        self.folder = matrix.folder / f"case-{self.number}"
        self.output, self.run_directory = self.folder / "out", self.folder / "out.run"
        self.folder.mkdir()
        if matrix.old:
            self.output.mkdir()
            for name, raw in matrix.old.items():
                (self.output / name).write_bytes(raw)
        self.drivers: list[Driver] = []

    def start(
        self, injection: Injection | None = None, lock_options: dict[str, float] | None = None
    ) -> Driver:
        """A driver of the job."""
        arguments = ["prune", self.matrix.model, self.output, f"--dataset={self.matrix.text}"]
        log = self.matrix.folder / f"log-{self.number}-{len(self.drivers)}"
        self.drivers.append(
            Driver(
                [*arguments, *OPTIONS, *self.matrix.more],
                log,
                injection=injection,
                lock_options=lock_options,
                within=self.matrix.within,
            )
        )
        return self.drivers[-1]

    def run(self, injection: Injection | None = None) -> int:
        """A driver to its end; its exit status."""
        return self.start(injection).wait()

    def errors(self) -> str:
        return self.drivers[-1].errors()

    def killed(self, at: int | str, number: signal.Signals = signal.SIGKILL) -> None:
        """A driver is killed at a point, and leaves what can be trusted."""
        status = self.run(Injection(self.folder, at, number))
        self.check_stopped(status, number)
        self.check_committed()

    def check_stopped(self, status: int, number: signal.Signals) -> None:
        """It ended by the signal, and has cleaned up if it could."""
        driver = self.drivers[-1]
        if number == signal.SIGKILL:
            assert status == -number, f"status {status}: {driver.errors()}"
            return
        assert status == 130, f"status {status}: {driver.errors()}"
        assert f"prox24: stopped by {number.name}" in driver.errors()
        assert "Traceback" not in driver.errors()
        assert driver.session() == []
        assert not list(self.run_directory.glob("lock-*.json"))
        left = {path.name for path in self.folder.iterdir()} - {"out", "out.run"}
        if self.matrix.old:
            # The old output is in place, or the new one and perhaps the old one's remains.
            assert self.output.exists()
            left -= {".out.prox24-replaced"} if contents(self.output) != self.matrix.old else set()
        assert not left

    def check_committed(self) -> None:
        """Everything that counts is whole: records, what they name, the output."""
        run = RunDirectory(self.run_directory)
        if run.manifest.exists():
            manifest = read_json(run.manifest, 1)
            tokens = StoredFile.from_json(manifest["tokens"])
            verify_file(run.path / tokens.name, tokens.sha256)
        for block in run.committed_blocks():
            verify_record(run.checkpoints(block), read_block_record(run.record(block)))
        for block in run.committed_activations():
            for entry in read_json(run.activation_record(block), 1)["shards"]:
                stored = StoredFile.from_json(entry)
                verify_file(run.activations(block) / stored.name, stored.sha256)
        if self.output.exists():
            assert contents(self.output) in (self.matrix.output, self.matrix.old)

    def resumed(self) -> None:
        """The same command goes on, and in the end nothing tells that it was ever stopped."""
        status = self.run()
        assert status == 0, f"resumed, status {status}: {self.errors()}"
        self.check_finished()

    def printed_command(self) -> list[str]:
        """The command that the last driver told the user to go on with."""
        (line,) = [line for line in self.errors().splitlines() if "go on with: " in line]
        return shlex.split(line.partition("go on with: prox24 ")[2])

    def check_finished(self, beside: Iterable[str] = ()) -> None:
        """Output and run directory are those of a job that nothing disturbed.

        beside: beginnings of names that may also lie beside the output.
        """
        found, expected = contents(self.output), self.matrix.output
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []
        names = {path.name for path in self.folder.iterdir()}
        assert {n for n in names if not n.startswith(tuple(beside))} == {"out", "out.run"}
        left = contents(self.run_directory)
        assert left.keys() == self.matrix.left.keys()
        for name in ("run.json", "tokens.arrow"):
            assert left[name] == self.matrix.left[name]

    def end(self) -> None:
        """Nothing of it is left, processes included."""
        for driver in self.drivers:
            driver.end()
        shutil.rmtree(self.folder)


def kill_and_resume(matrix: Matrix, at: int | str, number: signal.Signals) -> None:
    """One case from its beginning to its end."""
    case = Case(matrix)
    case.killed(at, number)
    case.resumed()
    case.end()


def each(
    matrix: Matrix, points: Iterable[int | str], number: signal.Signals = signal.SIGKILL
) -> None:
    """All those cases, two at a time; fails with the first that fails, naming its point."""

    def one(at: int | str) -> None:
        try:
            kill_and_resume(matrix, at, number)
        except AssertionError as error:
            name = matrix.points[at] if isinstance(at, int) else at
            raise AssertionError(f"{number.name} at point {at} ({name}): {error}") from error

    with ThreadPoolExecutor(2) as pool:
        for case in [pool.submit(one, at) for at in points]:
            case.result()


def fast_folder() -> Path | None:
    """Where thousands of small files cost little: memory, if the system offers a folder in it."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else None
