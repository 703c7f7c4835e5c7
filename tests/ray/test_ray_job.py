"""Jobs on real Ray workers: the bytes of the local executor, lost workers, and clusters that are
not there or too small.

One cluster serves all tests but the last; each driver is a process of its own.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.support.jobs import contents, prune_here, write_text
from tests.support.processes import Driver, until
from tests.support.tiny_models import save_tiny_model

BLOCKS = 8
OPTIONS = {
    "nsamples": 8, "seqlen": 32, "batch_size": 2, "threads": 1, "workers": 2, "reconstruct": "auto",
}  # fmt: skip


class Bench:
    """A job whose output by the local executor is known."""

    def __init__(self, folder: Path, model: Path, text: Path, expected: dict[str, bytes]) -> None:
        self.folder, self.model, self.text, self.expected = folder, model, text, expected
        self.output, self.run = folder / "output", folder / "output.run"
        self.drivers: list[Driver] = []

    def start(self, **options: object) -> Driver:
        options = {"dataset": self.text} | OPTIONS | options
        given = {key: value for key, value in options.items() if value is not None}
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
        log = self.folder / f"log-{len(self.drivers)}"
        self.drivers.append(Driver(["prune", self.model, self.output, *arguments], log))
        return self.drivers[-1]

    def reached(self, driver: Driver, block: int) -> None:
        """Waits for a committed block."""
        record = self.run / "checkpoints" / f"block-{block:03d}" / "record.json"
        until(lambda: record.exists() or not driver.running, f"block {block}")
        assert record.exists(), driver.errors()

    def check(self) -> None:
        found = contents(self.output)
        assert found.keys() == self.expected.keys()
        assert [name for name in found if found[name] != self.expected[name]] == []


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray of three CPUs on this machine."""
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 3,
            "include_dashboard": False,
            "object_store_memory": 100 << 20,
        },
    )
    yield str(made.address)
    made.shutdown()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("ray")
    model = save_tiny_model(folder / "model", "qwen2", blocks=BLOCKS, weight_files=3)
    text = write_text(folder / "text.txt")
    result = prune_here(model, folder / "output", dataset=str(text), **OPTIONS)
    return model, text, contents(result.output)


@pytest.fixture
def bench(source: tuple[Path, Path, dict[str, bytes]], tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, *source)
    yield bench
    for driver in bench.drivers:
        driver.end()


def ranks() -> list[psutil.Process]:
    """The processes of our ranks on the clusters that these tests started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            # A process that has just ended has no command line any more.
            if "RankActor" in "".join(process.cmdline()[:1]):
                found.append(process)
    return found


def test_a_lost_driver_and_a_lost_worker(bench: Bench, cluster: str) -> None:
    """The job ends with the bytes of the local executor's two ranks all the same.

    It goes on at once, though the dead driver's workers may still hold the cluster's CPUs.
    """
    driver = bench.start(ray_address=cluster)
    bench.reached(driver, 1)
    driver.send(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    until(lambda: not ranks(), "the end of a dead driver's workers")
    driver = bench.start(ray_address=cluster)
    bench.reached(driver, 3)
    assert len(ranks()) == 2
    ranks()[1].send_signal(signal.SIGKILL)
    assert driver.wait() == 0, driver.errors()
    bench.check()
    assert f"of {BLOCKS} blocks are already done" in driver.errors()
    assert driver.errors().count("trying again") == 1
    assert "Traceback" not in driver.errors()
    until(lambda: not ranks(), "the end of the workers")


@pytest.mark.slow
def test_another_number_of_workers_with_default_threads(bench: Bench, cluster: str) -> None:
    """One worker of three threads begins, three workers of one thread go on."""
    driver = bench.start(ray_address=cluster, workers=1, threads=None)
    bench.reached(driver, 1)
    (held,) = ranks()
    driver.send(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    until(lambda: not held.is_running(), "the end of the worker")
    driver = bench.start(ray_address=cluster, workers=3, threads=None)
    assert driver.wait() == 0, driver.errors()
    bench.check()
    assert f"of {BLOCKS} blocks are already done" in driver.errors()


def test_more_workers_than_the_cluster_has(bench: Bench, cluster: str) -> None:
    """It is waited for, in case that the cluster grows; what is free and missing is said."""
    driver = bench.start(ray_address=cluster, workers=4, placement_timeout=3)
    assert driver.wait() == 2
    assert "1 CPU for 1 more; waiting 3 s (--placement-timeout)" in driver.errors()
    (line,) = [line for line in driver.errors().splitlines() if line.startswith("prox24: ")]
    for text in ("4 workers of 1 CPU", "3 of 3 CPU free, for 3; one more lacks 1 CPU", "--workers"):
        assert text in line
    assert "Traceback" not in driver.errors()
    assert not bench.output.exists()
    assert not bench.run.exists()


@pytest.mark.slow
def test_a_refused_job_holds_nothing_of_the_cluster(bench: Bench, cluster: str) -> None:
    """Its workers were placed while the model was being checked, if there was room for them.

    With room: another job can have all CPUs afterwards. Without: the refusal does not wait.
    """

    def refused() -> None:
        driver = bench.start(ray_address=cluster, include="nothing", run_dir=bench.folder / "other")
        assert driver.wait() == 2
        (line,) = [line for line in driver.errors().splitlines() if line.startswith("prox24: ")]
        assert "--include" in line
        assert "find room" not in driver.errors()
        assert "Traceback" not in driver.errors()
        assert not (bench.folder / "other").exists()

    refused()
    until(lambda: not ranks(), "the end of the refused job's workers")
    whole = bench.start(ray_address=cluster, workers=3, placement_timeout=10)
    bench.reached(whole, 0)
    refused()
    assert len(ranks()) == 3
    assert whole.wait() == 0, whole.errors()
    bench.check()


def test_a_device_that_the_workers_lack(bench: Bench, cluster: str) -> None:
    """A worker's own complaint, though it could not even start."""
    driver = bench.start(ray_address=cluster, device="cuda:99")
    assert driver.wait() == 2
    (line,) = [line for line in driver.errors().splitlines() if line.startswith("prox24: ")]
    assert "--device cuda:99" in line
    assert not bench.run.exists()


def test_no_cluster_at_the_address(bench: Bench) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    driver = bench.start(ray_address=address)
    assert driver.wait() == 2
    lines = driver.errors().splitlines()
    (line,) = [line for line in lines if line.startswith("prox24: ")]
    assert address in line
    assert "--ray-address" in line
    assert "Traceback" not in driver.errors()
    assert not bench.output.exists()
    assert not bench.run.exists()


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_ray_of_its_own_ends_with_its_driver(bench: Bench, number: signal.Signals) -> None:
    """Nothing of it is left behind; the local executor goes on with the job."""
    driver = bench.start()
    bench.reached(driver, 0)
    started = psutil.Process(driver.pid).children(recursive=True)
    assert any("raylet" in process.name() for process in started)
    driver.send(number)
    if number == signal.SIGINT:
        assert driver.wait() == 130
        assert "go on with: prox24 prune" in driver.errors()
    else:
        assert driver.wait() == -number
    until(lambda: not any(process.is_running() for process in started), "the end of Ray")
    again = bench.start(executor="local")
    assert again.wait() == 0, again.errors()
    bench.check()
