"""A node of three lost for real, with all that runs on it: it comes back, or it does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from storage.errors import ResourceError
from tests.support.jobs import check_output, contents, write_text
from tests.support.processes import until
from tests.support.ray_jobs import QUICK_TO_NOTICE, STORE_BYTES, RayJob, ray_cluster, undisturbed
from tests.support.tiny_models import save_tiny_model

BLOCKS = 5
# With a reconstruction a block takes long enough to lose a node in.
WORKERS = {"workers": 3, "nsamples": 12, "reconstruct": "auto"}

Source = tuple[Path, Path, dict[str, bytes]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("nodes")
    model = save_tiny_model(folder / "model", blocks=BLOCKS, weight_files=2)
    text = write_text(folder / "text.txt")
    return model, text, undisturbed(model, text, folder / "whole", **WORKERS)


class Nodes:
    """A cluster of a head and two more nodes of one CPU each."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.others: list[Any] = []

    def complete(self) -> None:
        """Three nodes again."""
        while len(self.others) < 2:
            self.others.append(self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES))

    def lose(self) -> None:
        """Kills a node: its raylet and all of its workers."""
        self.cluster.remove_node(self.others.pop(), allow_graceful=False)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with ray_cluster(1, **QUICK_TO_NOTICE) as made:
        yield Nodes(made)


@pytest.fixture
def nodes(cluster: Nodes) -> Nodes:
    cluster.complete()
    return cluster


def start(source: Source, folder: Path, nodes: Nodes, **options: Any) -> RayJob:
    model, text, _ = source
    return RayJob(folder, model, text, str(nodes.cluster.address), [], **(WORKERS | options))


class Afterwards(threading.Thread):
    """Waits for a job's committed block and then does something to it, while the job runs."""

    def __init__(self, job: RayJob, block: int, action: Any) -> None:
        super().__init__(daemon=True)
        self.record = job.run_directory / "checkpoints" / f"block-{block:03d}" / "record.json"
        self.action = action
        self.start()

    def run(self) -> None:
        until(self.record.exists, str(self.record))
        self.action()


def test_a_node_that_comes_back(source: Source, nodes: Nodes, tmp_path: Path) -> None:
    """The job waits for it, and ends with the bytes of the job that lost none."""
    job = start(source, tmp_path, nodes)

    def come_back(note: str) -> None:
        if "--node-wait" in note:
            nodes.complete()

    job.progress.on_note = come_back
    other = Afterwards(job, 1, nodes.lose)
    result = job.run()
    other.join()
    assert contents(job.output) == source[2]
    assert [block["world"] for block in result.summary["blocks"]] == [3] * BLOCKS
    assert any("a node is lost" in note for note in job.progress.notes)


@pytest.mark.slow  # the decision is in test_shared_folders, real hosts in test_namespaces
def test_a_node_that_does_not_see_the_run_directory(
    source: Source, nodes: Nodes, tmp_path: Path
) -> None:
    """Refused before compute, naming the node; nothing is left of the question."""
    job = start(source, tmp_path, nodes)
    job.plan.make_blind(1)
    with pytest.raises(ResourceError) as caught:
        job.run()
    for text in ("node ", "does not see", "(--run-dir)", str(job.run_directory), "share"):
        assert text in str(caught.value)
    assert not job.output.exists()
    assert not job.run_directory.exists()
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.slow
def test_a_node_lost_for_good_and_fewer_workers(
    source: Source, nodes: Nodes, tmp_path: Path
) -> None:
    job = start(source, tmp_path, nodes, on_lost_node="shrink", node_wait=1.0)
    other = Afterwards(job, 1, nodes.lose)
    result = job.run()
    other.join()
    worlds = [block["world"] for block in result.summary["blocks"]]
    assert worlds[0] == 3
    assert worlds[-1] == 2
    assert [len(block["workers"]) for block in result.summary["blocks"]] == worlds
    assert any("going on with 2 of 3 workers" in note for note in job.progress.notes)
    check_output(source[0], job.output)
    assert contents(job.output) == source[2]


@pytest.mark.slow
def test_a_node_lost_for_good_and_no_fewer_workers(
    source: Source, nodes: Nodes, tmp_path: Path
) -> None:
    """It stops after the wait, says what is missing, and goes on when the node is back."""
    job = start(source, tmp_path, nodes, node_wait=1.0)
    other = Afterwards(job, 1, nodes.lose)
    with pytest.raises(ResourceError) as caught:
        job.run()
    other.join()
    for text in ("3 workers", "2 nodes", "hold 2", "--node-wait", "same command", "shrink"):
        assert text in str(caught.value)
    assert not job.output.exists()
    kept = len(list(job.run_directory.glob("checkpoints/*/record.json")))
    assert kept >= 2
    nodes.complete()
    again = start(source, tmp_path, nodes)
    again.run()
    assert contents(again.output) == source[2]
