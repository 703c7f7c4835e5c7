"""Three hosts on a network, each with its own `ray start`, and one of them cut off in the middle.

What `tests.ray.test_ray_nodes` does with a node's processes is done here to its link: no connection
is closed, what is sent is lost, and the host goes on with its work, which must change nothing.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.jobs import check_output, contents, write_text
from tests.support.namespaces import AUTOSCALING, HostedDriver, Network, network
from tests.support.processes import until
from tests.support.ray_jobs import undisturbed
from tests.support.tiny_models import save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

BLOCKS = 8
WORKERS = {"workers": 3, "nsamples": 12}

Source = tuple[Path, Path, dict[str, bytes]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("hosts")
    model = save_tiny_model(folder / "model", blocks=BLOCKS, weight_files=2)
    text = write_text(folder / "text.txt")
    return model, text, undisturbed(model, text, folder / "whole", reconstruct="auto", **WORKERS)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    # Paths of sockets are short.
    with (
        tempfile.TemporaryDirectory(prefix="p24-", ignore_cleanup_errors=True) as folder,
        network(Path(folder), 3) as made,
    ):
        for host in made.hosts:
            made.start_ray(host)
        yield made


class HostedJob:
    """A job whose driver runs on the first host, from this checkout."""

    def __init__(
        self, hosts: Network, source: Source, repository: Path, folder: Path, *options: str
    ) -> None:
        self.output, self.run_directory = folder / "output", folder / "output.run"
        arguments = [
            "-m", "cluster", "prune", source[0], self.output, f"--dataset={source[1]}",
            f"--ray-address={hosts.address}", "--workers=3", "--nsamples=12", "--seqlen=32",
            "--batch-size=2", "--threads=1", *options,
        ]  # fmt: skip
        self.driver = HostedDriver(hosts, repository, arguments, folder / "log")

    def reached(self, block: int) -> None:
        """Waits for a committed block."""
        record = self.run_directory / "checkpoints" / f"block-{block:03d}" / "record.json"
        running = self.driver.process
        until(lambda: record.exists() or running.poll() is not None, f"block {block}")
        assert record.exists(), self.driver.messages()

    def said(self, text: str) -> None:
        """Waits for a message."""
        running = self.driver.process
        until(lambda: text in self.driver.messages() or running.poll() is not None, f"'{text}'")
        assert text in self.driver.messages()


def test_a_host_cut_off_and_back_again(
    hosts: Network, source: Source, repository: Path, tmp_path: Path
) -> None:
    """The job waits for it, and ends with the bytes of the job that lost none."""
    job = HostedJob(hosts, source, repository, tmp_path, "--network-interface=eth0")
    lost = hosts.hosts[2]
    try:
        job.reached(1)
        hosts.cut(lost)
        job.said("a node is lost")
        hosts.mend(lost)
        # Ray's node was declared dead, and stays so: its host joins anew.
        lost.kill()
        hosts.start_ray(lost)
        assert job.driver.wait() == 0, job.driver.messages()
    finally:
        job.driver.end()
        print(job.driver.messages())
    assert contents(job.output) == source[2]
    assert "3 workers are ready again" in job.driver.messages()


def test_a_host_that_does_not_see_the_run_directory(
    hosts: Network, source: Source, repository: Path, tmp_path: Path
) -> None:
    """Refused before compute, with the host's address; here it has its own disk at that path."""
    blind = hosts.hosts[1]
    blind.kill()
    (tmp_path / "output.run").mkdir()
    hosts.start_ray(blind, before=f"mount -t tmpfs none {tmp_path}/output.run")
    job = HostedJob(hosts, source, repository, tmp_path)
    try:
        assert job.driver.wait() == 2, job.driver.messages()
    finally:
        job.driver.end()
        print(job.driver.messages())
        blind.kill()
        hosts.start_ray(blind)
    (line,) = [x for x in job.driver.messages().splitlines() if x.startswith("prox24: ")]
    assert f"({blind.address}) does not see what the driver writes to the run directory" in line
    assert str(job.run_directory) in line
    assert hosts.hosts[2].address not in line
    assert not job.output.exists()
    assert list(tmp_path.glob(".output*")) == []


def test_a_host_cut_off_for_good_and_fewer_workers(
    hosts: Network, source: Source, repository: Path, tmp_path: Path
) -> None:
    """The last one: the host stays away. What it still writes changes nothing."""
    job = HostedJob(hosts, source, repository, tmp_path, "--on-lost-node=shrink", "--node-wait=2")
    try:
        job.reached(1)
        hosts.cut(hosts.hosts[2])
        assert job.driver.wait() == 0, job.driver.messages()
    finally:
        job.driver.end()
        print(job.driver.messages())
    assert "going on with 2 of 3 workers" in job.driver.messages()
    check_output(source[0], job.output)
    assert contents(job.output) == source[2]


def test_an_autoscaler_is_asked_for_the_nodes_that_a_job_needs(
    source: Source, repository: Path, tmp_path: Path
) -> None:
    """A cluster of one CPU, whose (pretended) cloud adds the two that are missing."""
    with (
        tempfile.TemporaryDirectory(prefix="p24-", ignore_cleanup_errors=True) as folder,
        network(Path(folder), 1) as made,
    ):
        config = Path(folder) / "autoscaling.json"
        config.write_text(json.dumps(AUTOSCALING))
        made.start_ray(made.hosts[0], f"--autoscaling-config={config}")
        job = HostedJob(made, source, repository, tmp_path)
        try:
            assert job.driver.wait() == 0, job.driver.messages()
        finally:
            job.driver.end()
            print(job.driver.messages())
    assert "3 workers of 1 CPU each find room for 1 on 1 nodes" in job.driver.messages()
    assert contents(job.output) == source[2]
