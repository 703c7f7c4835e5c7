"""Room for workers on a real cluster of unequal nodes: the fewest take part; waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import ray

from cluster.dispatch.placement import Placement
from cluster.dispatch.reservation import Reservation, free_rooms, reserve
from storage.errors import ResourceError
from tests.support.ray_jobs import STORE_BYTES, ray_cluster


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A head without GPUs, and nodes of 4, 8 and 4 that are only said to be there."""
    with ray_cluster(1) as made:
        for gpus in (4, 8, 4):
            made.add_node(num_cpus=8, num_gpus=gpus, object_store_memory=STORE_BYTES)
        ray.init(address=made.address, log_to_driver=False)
        yield
        ray.shutdown()


def gpus_of(reservation: Reservation) -> list[float]:
    """How many GPUs each of the nodes has that take part."""
    total = {room.id: room.total.get("GPU", 0) for room in free_rooms()}
    return sorted(total[node] for node in set(reservation.nodes))


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.mark.parametrize(("workers", "nodes"), [(4, [4]), (8, [8]), (10, [4, 8]), (16, [4, 4, 8])])
def test_the_fewest_nodes_and_of_these_the_smallest(
    workers: int, nodes: list[float], notes: list[str]
) -> None:
    reservation = reserve(Placement(workers, 1, 1), 30, notes.append)
    try:
        assert gpus_of(reservation) == nodes
        assert len(reservation.nodes) == workers
        assert notes == []
    finally:
        reservation.release()


def test_it_waits_for_what_others_hold(notes: list[str]) -> None:
    others = reserve(Placement(2, 1, 4), 30, notes.append)
    release = threading.Timer(0.0, others.release)

    def note(message: str) -> None:
        notes.append(message)
        release.start()

    reservation = reserve(Placement(16, 1, 1), 60, note)
    try:
        assert gpus_of(reservation) == [4, 4, 8]
    finally:
        reservation.release()
    (told,) = notes
    assert "16 workers of 1 CPU and 1 GPU each find room for 8 on 4 nodes" in told
    assert "waiting 60 s (--placement-timeout)" in told


def test_what_never_comes_is_given_up_with_what_is_missing(notes: list[str]) -> None:
    with pytest.raises(ResourceError) as caught:
        reserve(Placement(20, 1, 1), 0, notes.append)
    for text in ("find room for 16 on 4 nodes", "4 CPU and 4 GPU for 4 more", "in 0 s"):
        assert text in str(caught.value)
    # Nothing of the request is left: the whole cluster can be had.
    reserve(Placement(16, 1, 1), 30, notes.append).release()
