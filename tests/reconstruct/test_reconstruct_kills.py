"""A job with --reconstruct whose driver or worker is killed: it goes on, to the same bytes.

Real signals, at the commit points that a reconstruction adds and between them, and in the middle of
an epoch.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline.worker.training.rank_training import RankTraining
from tests.support.injection import Injection
from tests.support.kill_matrix import OPTIONS, Case, Matrix, each, fast_folder
from tests.support.processes import Driver

MORE = ("--executor=local", "--no-report", "--reconstruct=block", "--reconstruct-epochs=2")

# What a reconstruction adds to a job, in the order in which it does it first.
POINTS = (
    "amid write .*targets/block-001/shard-00000",
    "before link .*targets/block-001/record.json",
    "after link .*targets/block-001/record.json",
    "amid write .*checkpoints/block-000/.solved.json",
    "before link .*checkpoints/block-000/solved.json",
    "after link .*checkpoints/block-000/solved.json",
    "amid write .*checkpoints/block-000/trained-1",
    "before link .*checkpoints/block-000/record.json",
    "after link .*checkpoints/block-000/record.json",
    "after unlink .*checkpoints/block-000/solved.json",
    "after unlink .*checkpoints/block-000/rank-1",
    "after link .*targets/block-002/record.json",
    "after unlink .*targets/block-001/record.json",
    "after unlink .*targets/block-001/shard",
    "after rmdir .*targets/block-001",
    "after link .*checkpoints/block-001/solved.json",
    "after link .*checkpoints/block-001/record.json",
    "before unlink .*targets/block-002/record.json",
    "after unlink .*targets/block-002/record.json",
)


@pytest.fixture(scope="module")
def matrix() -> Iterator[Matrix]:
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        yield Matrix(Path(folder), MORE)


def test_the_points_are_those_of_a_reconstruction(matrix: Matrix) -> None:
    committed = [
        "out.run/run.json",
        "out.run/activations/block-000/record.json",
        "out.run/targets/block-001/record.json",
        "out.run/checkpoints/block-000/solved.json",
        "out.run/checkpoints/block-000/record.json",
        "out.run/activations/block-001/record.json",
        "out.run/targets/block-002/record.json",
        "out.run/checkpoints/block-001/solved.json",
        "out.run/checkpoints/block-001/record.json",
    ]
    links = [point.split()[2] for point in matrix.points if point.startswith("before link")]
    assert links == committed
    new = [p for p in matrix.points if any(word in p for word in ("targets", "solved", "trained"))]
    assert len(new) > 100


def test_killed_at_each_new_kind_of_point(matrix: Matrix) -> None:
    each(matrix, POINTS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_on_request(matrix: Matrix, number: signal.Signals) -> None:
    each(matrix, [POINTS[2], POINTS[5], POINTS[9]], number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_killed_at_every_point(matrix: Matrix, part: int) -> None:
    each(matrix, range(part, len(matrix.points), 4))


def kill_in_step(wanted: int, number: int) -> None:
    """Has this process send itself a signal amid a step of the training, counted over all ranks."""
    step, done = RankTraining._to_owner, []

    def counted(*arguments: Any) -> Any:
        done.append(None)
        if len(done) == wanted:
            os.kill(os.getpid(), number)
        return step(*arguments)

    RankTraining._to_owner = counted  # type: ignore[method-assign]


@pytest.mark.parametrize(("step", "block"), [(1, 0), (15, 1)])
def test_killed_amid_an_epoch_it_goes_on_from_the_solved_slices(
    matrix: Matrix, step: int, block: int
) -> None:
    case = Case(matrix)
    arguments = ["prune", matrix.model, case.output, f"--dataset={matrix.text}", *OPTIONS, *MORE]
    first = partial(kill_in_step, step, signal.SIGKILL)
    case.drivers.append(Driver(arguments, matrix.folder / f"amid-{step}", first=first))
    assert case.drivers[-1].wait() == -signal.SIGKILL, case.errors()
    case.check_committed()
    (solved,) = case.run_directory.glob("checkpoints/*/solved.json")
    assert solved.parent.name == f"block-{block:03d}"
    assert not solved.with_name("record.json").exists()
    before = solved.stat().st_ino, solved.read_bytes()
    # Up to the commit of the block: nothing has solved it again.
    at = f"before link .*{solved.parent.name}/record.json"
    case.killed(at)
    assert (solved.stat().st_ino, solved.read_bytes()) == before
    case.resumed()
    case.end()


def test_killed_again_while_it_resumes(matrix: Matrix) -> None:
    case = Case(matrix)
    for at in POINTS[2::4]:
        assert case.run(Injection(case.folder, at)) in (0, -signal.SIGKILL), case.errors()
        case.check_committed()
    case.resumed()
    case.end()
