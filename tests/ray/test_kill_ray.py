"""A driver of Ray workers, killed at its commit points or frozen with all of its workers.

One cluster serves all of its drivers, and outlives them: starting one takes longer than the job.
"""

from __future__ import annotations

import contextlib
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.job.test_frozen import LOCK, freeze, state
from tests.support.injection import Injection
from tests.support.kill_matrix import Case, Matrix, fast_folder
from tests.support.processes import until

# One after another in a single job: each driver goes on with it and is killed at a later point.
POINTS = (
    "before link out.run/run.json",
    "before link out.run/activations/block-000/record.json",
    "before link out.run/checkpoints/block-000/record.json",
    "after link out.run/checkpoints/block-000/record.json",
    "after link out.run/activations/block-001/record.json",
    "amid write out.run/checkpoints/block-001/.record.json",
    "before replace out.run/report/summary.json",
    "amid write .out.partial-.*/prox24.json",
    "before rename out$",
    "before unlink out.run/checkpoints/block-001/record.json",
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a Ray with room for the workers of a driver that died and of the next one."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4,
            "include_dashboard": False,
            "object_store_memory": 100 << 20,
        },
    )
    yield str(cluster.address)
    cluster.shutdown()


@pytest.fixture(scope="module")
def matrix(address: str) -> Iterator[Matrix]:
    """The local executor says what comes out; the cases then run on Ray."""
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        matrix = Matrix(Path(folder), ("--executor=local", "--workers=1"))
        matrix.more = (f"--ray-address={address}", "--workers=1")
        yield matrix


def ranks() -> list[psutil.Process]:
    """The processes of ranks on the clusters that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RankActor" in "".join(process.cmdline()[:1]):
                found.append(process)
    return found


def test_killed_at_one_point_after_the_other(matrix: Matrix) -> None:
    case = Case(matrix)
    for at in POINTS:
        case.killed(at)
    case.resumed()
    until(lambda: not ranks(), "the end of the dead drivers' workers")
    case.end()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_stopped_on_request_and_gone_on_with(matrix: Matrix, number: signal.Signals) -> None:
    case = Case(matrix)
    case.killed("before link out.run/checkpoints/block-001/record.json", number)
    until(lambda: not ranks(), "the end of its workers")
    assert case.printed_command()[0] == "prune"
    case.resumed()
    case.end()


@pytest.mark.slow
def test_frozen_with_its_workers_and_replaced(matrix: Matrix) -> None:
    """The driver in its commit, the worker with it; both wake up when the job is done."""
    case = Case(matrix)
    try:
        frozen = freeze(case, "before link out.run/checkpoints/block-000/record.json")
        workers = ranks()
        assert workers
        for process in workers:
            process.suspend()
        matrix.more, ray = ("--executor=local", "--workers=1"), matrix.more
        second = case.start(None, LOCK)
        matrix.more = ray
        assert second.wait() == 0, second.errors()
        before = state(case.folder)
        for process in workers:
            process.resume()
        frozen.send(signal.SIGCONT)
        assert frozen.wait() == 2, frozen.errors()
        assert "another process took the run over" in frozen.errors()
        until(lambda: not ranks(), "the end of its workers")
        assert state(case.folder) == before
        case.check_finished()
    finally:
        case.end()


@pytest.mark.slow
def test_a_worker_frozen_amid_its_phase_wakes_up_late(matrix: Matrix) -> None:
    """The driver too; the worker's files, written when all is done, do not stay."""
    case = Case(matrix)
    try:
        driver = case.start(None, LOCK)
        until(lambda: (case.run_directory / "run.json").exists() or not driver.running, "a job")
        workers = until(ranks, "a worker")
        for process in workers:
            process.suspend()
        driver.send(signal.SIGSTOP)
        until(lambda: psutil.Process(driver.pid).status() == "stopped", "the driver's stop")
        matrix.more, ray = ("--executor=local", "--workers=1"), matrix.more
        second = case.start(None, LOCK)
        while second.wait() == 2:  # as long as its last heartbeat is fresh
            second = case.start(None, LOCK)
        matrix.more = ray
        assert second.wait() == 0, second.errors()
        before = state(case.folder)
        for process in workers:
            process.resume()
        until(lambda: all(p.cpu_percent(0.1) < 5 for p in ranks()), "the end of the late phase")
        assert state(case.folder) == before
        driver.send(signal.SIGCONT)
        assert driver.wait() == 2, driver.errors()
        assert "another process took the run over" in driver.errors()
        assert state(case.folder) == before
        case.check_finished()
    finally:
        case.end()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_many_points(matrix: Matrix, number: signal.Signals) -> None:
    """Each in a job of its own, which a second driver finishes."""
    names = matrix.folder / "points"
    whole = Case(matrix)
    assert whole.run(Injection(whole.folder, names=names)) == 0, whole.errors()
    whole.check_finished()
    passed = len(names.read_text().splitlines())
    for at in range(3, passed, passed // 10):
        case = Case(matrix)
        case.killed(at, number)
        case.resumed()
        case.end()
    until(lambda: not ranks(), "the end of all workers")
