"""Ranks go back to the nodes whose scratch they wrote to: real nodes of other addresses, on Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.ray.test_ray_nodes import Afterwards
from tests.support.jobs import contents, write_text
from tests.support.ray_jobs import QUICK_TO_NOTICE, STORE_BYTES, RayJob, ray_cluster, undisturbed
from tests.support.tiny_models import save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
BLOCKS = 4


class Hosts:
    """Nodes with an address and a scratch of their own, which outlive the node's Ray."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.nodes: dict[str, Any] = {}

    def add(self, name: str, cpus: int = 1) -> None:
        scratch = self.folder / name
        scratch.mkdir(exist_ok=True)
        self.nodes[name] = self.cluster.add_node(
            num_cpus=cpus,
            node_ip_address=f"127.0.0.{2 + 'abcd'.index(name)}",
            object_store_memory=STORE_BYTES,
            env_vars={"PROX24_TEST_SCRATCH": str(scratch)},
        )

    def lose(self, name: str) -> None:
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with ray_cluster(0, **QUICK_TO_NOTICE) as made:
        yield Hosts(made, tmp_path)


class Case:
    def __init__(self, folder: Path, hosts: Hosts, workers: int) -> None:
        self.options = {"workers": workers, "nsamples": 12}
        self.folder, self.hosts = folder, hosts
        self.model = save_tiny_model(folder / "model", blocks=BLOCKS)
        self.text = write_text(folder / "text.txt")
        self.expected = undisturbed(self.model, self.text, folder / "whole", **self.options)

    def job(self) -> RayJob:
        address = str(self.hosts.cluster.address)
        options = {**self.options, "scratch_dir": "$PROX24_TEST_SCRATCH"}
        return RayJob(self.folder, self.model, self.text, address, [], **options)

    def addresses(self) -> list[list[str]]:
        """By block, the addresses of the nodes whose ranks wrote its inputs."""
        records = sorted(self.folder.glob("output.run/report/inputs-*.json"))
        workers = [json.loads(path.read_text())["workers"] for path in records]
        return [[own["node_address"] for own in ranks] for ranks in workers]


def moved(job: RayJob) -> list[str]:
    return [note for note in job.progress.notes if "missing from the scratch" in note]


class Stop(Exception):
    """The job ends here."""


def test_a_resumed_job_finds_its_activations(hosts: Hosts, tmp_path: Path) -> None:
    """On nodes whose Ray was started anew, and beside one on which all ranks would have room."""
    hosts.add("a")
    hosts.add("b")
    case = Case(tmp_path, hosts, 2)
    first = case.job()

    def stop(block: int, error: float | None) -> None:
        if block == 1:
            raise Stop

    first.progress.block_done = stop  # type: ignore[method-assign]
    with pytest.raises(Stop):
        first.run()
    for name in "ab":
        hosts.lose(name)
    hosts.add("d", cpus=2)
    for name in "ba":
        hosts.add(name)
    second = case.job()
    second.run()
    assert moved(second) == []
    nodes = case.addresses()
    assert len(nodes) == BLOCKS
    assert sorted(nodes[0]) == ["127.0.0.2", "127.0.0.3"]
    assert nodes == [nodes[0]] * BLOCKS
    assert contents(second.output) == case.expected


def test_a_lost_node_moves_no_other_rank(hosts: Hosts, tmp_path: Path) -> None:
    """Its own rank goes elsewhere and makes its activations again; the others find theirs."""
    for name in "abc":
        hosts.add(name)
    case = Case(tmp_path, hosts, 3)
    job = case.job()

    def replace_it(note: str) -> None:
        if "--node-wait" in note:
            hosts.add("d")

    job.progress.on_note = replace_it
    other = Afterwards(job, 1, lambda: hosts.lose("b"))
    job.run()
    other.join()
    nodes = case.addresses()
    assert sorted(nodes[0]) == ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    lost = nodes[0].index("127.0.0.3")
    assert [*nodes[-1][:lost], *nodes[-1][lost + 1 :]] == [*nodes[0][:lost], *nodes[0][lost + 1 :]]
    assert nodes[-1][lost] == "127.0.0.5"
    assert len(moved(job)) == 1
    assert contents(job.output) == case.expected
