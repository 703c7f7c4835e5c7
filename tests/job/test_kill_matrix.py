"""A driver killed at every commit point and between them, and the same bytes in the end.

Each case is a job of its own that gets a real signal at one point (`tests.support.injection`), and
is then gone on with by the same command. `python benchmarks/faults.py` runs all of them and counts.
"""

from __future__ import annotations

import random
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.injection import Injection
from tests.support.jobs import write_text
from tests.support.kill_matrix import Case, Matrix, each, fast_folder
from tests.support.processes import Driver, until

# How many points of the job the quick suite tries.
QUICK_POINTS = 60


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def matrix(folder: Path) -> Matrix:
    """The plain job."""
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


def test_the_points_are_where_a_job_can_break(matrix: Matrix) -> None:
    """Else the other tests would prove little: each kind of commit is among them, in order."""
    committed = [
        "out.run/run.json",
        "out.run/activations/block-000/record.json",
        "out.run/checkpoints/block-000/record.json",
        "out.run/activations/block-001/record.json",
        "out.run/checkpoints/block-001/record.json",
    ]
    links = [point.split()[2] for point in matrix.points if point.startswith("before link")]
    assert links == committed
    assert matrix.points.count("after rename out") == 1
    assert sum("amid write" in point for point in matrix.points) > 50
    assert len(matrix.points) > 400


def test_killed_at_points_spread_over_the_job(matrix: Matrix) -> None:
    each(matrix, matrix.spread(QUICK_POINTS))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_at_points_spread_over_the_job(matrix: Matrix, number: signal.Signals) -> None:
    each(matrix, matrix.spread(6), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_that_is_printed_goes_on(matrix: Matrix, number: signal.Signals) -> None:
    case = Case(matrix)
    case.killed("before link .*checkpoints/block-001", number)
    command = case.printed_command()
    driver = Driver(command, matrix.folder / "printed")
    assert driver.wait() == 0, driver.errors()
    assert "1 of 2 blocks are already done" in driver.errors()
    case.check_finished()
    case.end()


@pytest.mark.parametrize(
    "seeds", [range(3), pytest.param(range(3, 60), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_killed_again_while_it_resumes(matrix: Matrix, seeds: range) -> None:
    for seed in seeds:
        generator = random.Random(seed)
        case = Case(matrix)
        case.killed(generator.randrange(len(matrix.points)))
        for _ in range(2):
            # The points of what is left, which is less: beyond the last one it finishes.
            status = case.run(Injection(case.folder, generator.randrange(300)))
            assert status in (0, -signal.SIGKILL), case.errors()
            case.check_committed()
        case.resumed()
        case.end()


def test_of_drivers_that_start_at_once_one_works(matrix: Matrix) -> None:
    """In a dead driver's directory. The others are refused, and told by whom it is held."""
    case = Case(matrix)
    case.killed("before link .*checkpoints/block-001/record.json")
    try:
        # It stops when it is about to commit, so that all others meet it alive.
        stop = Injection(case.folder, "before link .*block-001/record.json", signal.SIGSTOP)
        drivers = [case.start(stop) for _ in range(4)]
        until(lambda: sum(driver.running for driver in drivers) == 1, "a winner")
        (winner,) = [driver for driver in drivers if driver.running]
        for loser in drivers:
            if loser is not winner:
                assert loser.wait() == 2
                line = loser.errors().splitlines()[-1]
                assert f"in use by process {winner.pid} on {socket.gethostname()}" in line
                assert "last heartbeat 20" in line
        assert "1 of 2 blocks are already done" in winner.errors()
        winner.send(signal.SIGCONT)
        assert winner.wait() == 0, winner.errors()
        case.check_finished()
    finally:
        case.end()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_killed_at_every_point(matrix: Matrix, part: int) -> None:
    each(matrix, range(part, len(matrix.points), 8))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_at_every_point(matrix: Matrix, number: signal.Signals, part: int) -> None:
    each(matrix, range(part, len(matrix.points), 4), number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_job_with_everything(rich: Matrix, number: signal.Signals) -> None:
    """Points of its own, at a distance that shares no divisor with the plain job's repetitions."""
    each(rich, range(0, len(rich.points), 7 if number == signal.SIGKILL else 13), number)


def test_the_old_output_is_there_until_the_new_one_is(rich: Matrix) -> None:
    """At the three points around the two renames that put the one in the other's place."""
    around = ("after rename .*replaced", "before rename out$", "after rename out$")
    each(rich, around)
    each(rich, around, signal.SIGTERM)


def test_killed_while_it_reports(rich: Matrix) -> None:
    """The output is whole by then; the same command makes what is missing of the report."""
    around = ("after replace .*report.parquet", "amid write .*report.html")
    each(rich, around)
    each(rich, around[1:], signal.SIGTERM)
