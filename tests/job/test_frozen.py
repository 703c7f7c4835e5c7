"""A driver that freezes, is replaced, and wakes up: what it does late changes nothing.

It is stopped (SIGSTOP) at a chosen one of its commit points, so also between a check of the lock
and what the check allows. Another driver waits for its heartbeat in vain, takes over and finishes.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from storage.run.lock import read_owner
from tests.support.injection import Injection
from tests.support.jobs import write_text
from tests.support.kill_matrix import Case, Matrix, fast_folder
from tests.support.processes import Driver, until

# A stopped driver is given up after half a second, and after as long again of being watched.
LOCK = {"heartbeat_seconds": 0.05, "stale_seconds": 0.5}

# (inode, time of change, size) of every file: a file that is written again, though with the same
# bytes, does not have the same.
State = dict[str, tuple[int, int, int]]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def matrix(folder: Path) -> Matrix:
    (folder / "plain").mkdir()
    return Matrix(folder / "plain")


@pytest.fixture(scope="module")
def rich(folder: Path) -> Matrix:
    """A job that also chooses, saves layers, measures the perplexity and replaces an output."""
    (folder / "rich").mkdir()
    text = write_text(folder / "evaluated.txt", 64, seed=1)
    return Matrix(
        folder / "rich",
        (
            "--executor=local", "--shrinkage=auto", "--save-layers=*.0.*q_proj", "--overwrite",
            f"--eval-dataset={text}",
        ),
        {"old.txt": b"precious"},
    )  # fmt: skip


def state(folder: Path) -> State:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            found[str(path.relative_to(folder))] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return found


def freeze(case: Case, at: int | str, number: signal.Signals = signal.SIGSTOP) -> Driver:
    """A driver that stops itself at a point of its job."""
    driver = case.start(Injection(case.folder, at, number), LOCK)
    process = psutil.Process(driver.pid)
    until(lambda: process.status() in ("stopped", "zombie"), f"point {at}")
    assert process.status() == "stopped", driver.errors()
    if (owner := read_owner(case.run_directory)) is not None:
        until(lambda: time.time() - owner.heartbeat > LOCK["stale_seconds"], "an old heartbeat")
    return driver


def replaced_and_woken(matrix: Matrix, at: int | str) -> None:
    """It wakes up after the second driver has finished the job."""
    case = Case(matrix)
    try:
        _replaced_and_woken(case, at)
    except AssertionError as error:
        name = matrix.points[at] if isinstance(at, int) else at
        raise AssertionError(f"frozen at point {at} ({name}): {error}") from error
    finally:
        case.end()


def _replaced_and_woken(case: Case, at: int | str) -> None:
    frozen = freeze(case, at)
    owned = bool(list(case.run_directory.glob("lock-*.json")))
    second = case.start(None, LOCK)
    assert second.wait() == 0, second.errors()
    if owned:
        assert f"in use by process {frozen.pid} on " in second.errors()
        assert "taking it over in" in second.errors()
    case.check_finished(beside={".out.partial"})
    before = state(case.folder)
    frozen.send(signal.SIGCONT)
    status = frozen.wait()
    if owned and "wrote " not in frozen.errors():
        assert status == 2, frozen.errors()
        line = frozen.errors().splitlines()[-1]
        assert line.startswith("prox24: ")
        assert "another process took the run over; let that one go on" in line
    else:
        # Before it had the lock, or while it let it go: the job is done.
        assert status == 0, frozen.errors()
    assert state(case.folder) == before
    case.check_finished()


def woken_amid(matrix: Matrix, at: int | str, then: int | str) -> None:
    """It wakes up, and ends, while the second driver is at a point `then` of what is left."""
    case = Case(matrix)
    try:
        frozen = freeze(case, at)
        second = freeze(case, then)
        frozen.send(signal.SIGCONT)
        assert frozen.wait() == 2, frozen.errors()
        assert "another process took the run over" in frozen.errors()
        second.send(signal.SIGCONT)
        assert second.wait() == 0, second.errors()
        case.check_finished()
    finally:
        case.end()


def each(matrix: Matrix, points: Iterable[int | str]) -> None:
    """Three at a time: they mostly wait."""
    with ThreadPoolExecutor(3) as pool:
        for case in [pool.submit(replaced_and_woken, matrix, at) for at in points]:
            case.result()


# Between the check of the lock and what it allows, in the middle of a file, before a deletion.
AT = (
    "before replace .*/tokens.arrow",
    "before link out.run/run.json",
    "amid write out.run/checkpoints/block-000/rank-0",
    "before link out.run/checkpoints/block-000/record.json",
    "before unlink out.run/activations/block-000/record.json",
    "before replace out.run/report/summary.json",
    "amid write .out.partial-.*/.model-00002",
    "before rename out$",
    "before unlink out.run/checkpoints/block-001/record.json",
)


def test_replaced_at_the_moments_that_matter(matrix: Matrix) -> None:
    each(matrix, AT)


def test_replaced_before_it_moves_the_old_output_or_saves_a_layer(rich: Matrix) -> None:
    late = ("before rename .*prox24-replaced", "before rename out$", "before open .*/layers/")
    each(rich, late)


@pytest.mark.parametrize(
    ("at", "then"),
    [
        ("before link .*checkpoints/block-000/record", "before link .*checkpoints/block-000/rec"),
        ("before unlink .*activations/block-000/record", "amid write .*checkpoints/block-001/rank"),
        ("before rename out$", "amid write .out.partial-.*README"),
    ],
)
def test_woken_while_its_replacement_works(matrix: Matrix, at: str, then: str) -> None:
    woken_amid(matrix, at, then)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_replaced_at_every_point(matrix: Matrix, part: int) -> None:
    each(matrix, range(part, len(matrix.points), 5))


@pytest.mark.slow
def test_replaced_in_a_job_with_everything(rich: Matrix) -> None:
    each(rich, range(0, len(rich.points), 7))
