"""How many workers a job gets of a cluster, and the refusal of more than it has."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.dispatch.placement import (
    NodeRoom,
    Placement,
    choose_placement,
    node_rooms,
    pack,
    placement_after_loss,
    shortage,
)
from storage.errors import ResourceError


def node(cpus: float, gpus: float = 0, *, alive: bool = True) -> dict[str, Any]:
    """A node as `ray.nodes()` tells of it."""
    resources = {"CPU": cpus, "memory": 1e9, "node:10.0.0.1": 1.0}
    if gpus:
        resources["GPU"] = gpus
    return {"Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    ("asked", "nodes", "placement"),
    [
        ((None, None, None), [node(8)], Placement(1, 8, 0)),
        ((None, None, None), [node(8), node(4)], Placement(2, 4, 0)),
        ((2, None, None), [node(8)], Placement(2, 4, 0)),
        ((3, None, None), [node(8)], Placement(3, 2, 0)),
        # Six cores a worker would fit in sum, but no node's spare four are another's.
        ((3, None, None), [node(10), node(8)], Placement(3, 5, 0)),
        ((2, 1, None), [node(2)], Placement(2, 1, 0)),
        ((None, 4, None), [node(8), node(2)], Placement(1, 4, 0)),
        ((None, None, None), [node(16, 4), node(16, 4)], Placement(8, 1, 1)),
        ((3, None, None), [node(16, 4)], Placement(3, 1, 1)),
        ((None, None, 0.5), [node(16, 2)], Placement(4, 1, 0.5)),
        ((None, 2, 2.0), [node(16, 4)], Placement(2, 2, 2)),
        ((None, None, 0.0), [node(16, 4)], Placement(1, 16, 0)),
        ((None, None, None), [node(8), node(8, alive=False)], Placement(1, 8, 0)),
    ],
)
def test_what_is_left_open_is_filled_in(
    asked: tuple[Any, Any, Any], nodes: list[dict[str, Any]], placement: Placement
) -> None:
    assert choose_placement(*asked, nodes) == placement


@pytest.mark.parametrize(
    ("asked", "nodes", "names"),
    [
        ((5, None, None), [node(4)], ["5 workers", "1 CPU", "(4)"]),
        ((2, 3, None), [node(4)], ["2 workers", "3 CPU", "(1)"]),
        ((3, None, 1.0), [node(8, 2)], ["3 workers", "1 GPU", "(2)"]),
        ((1, None, 1.0), [node(8)], ["1 workers", "1 GPU", "(0)"]),
        ((None, 9, None), [node(8)], ["9 CPU", "(0)"]),
        ((1, None, None), [node(8, alive=False)], ["0 nodes"]),
        # In sum there are enough cores, but on no single node.
        ((1, 6, None), [node(4), node(4)], ["6 CPU", "2 nodes"]),
    ],
)
def test_more_than_the_cluster_has_is_refused(
    asked: tuple[Any, Any, Any], nodes: list[dict[str, Any]], names: list[str]
) -> None:
    with pytest.raises(ResourceError) as caught:
        choose_placement(*asked, nodes)
    for name in (*names, "--workers"):
        assert name in str(caught.value)


@given(
    cores=st.lists(st.integers(1, 64), min_size=1, max_size=6),
    workers=st.none() | st.integers(1, 40),
    threads=st.none() | st.integers(1, 64),
)
def test_a_placement_fits_node_by_node(
    cores: list[int], workers: int | None, threads: int | None
) -> None:
    try:
        placement = choose_placement(workers, threads, None, [node(c) for c in cores])
    except ResourceError:
        # Refused only where it truly does not fit, with the fewest threads allowed.
        assert sum(c // (threads or 1) for c in cores) < (workers or 1)
        return
    assert workers in (None, placement.workers)
    assert threads in (None, placement.threads)
    assert sum(c // placement.threads for c in cores) >= placement.workers >= 1


def test_what_ray_is_asked_for() -> None:
    assert Placement(2, 4, 0).bundle() == {"CPU": 4}
    assert Placement(2, 4, 0.5).bundle() == {"CPU": 4, "GPU": 0.5}


def test_a_cluster_that_may_grow_is_asked_for_more_than_it_has() -> None:
    nodes = [node(16, 4)]
    assert choose_placement(8, None, None, nodes, may_grow=True) == Placement(8, 1, 1)
    assert choose_placement(2, None, 1.0, [node(1)], may_grow=True) == Placement(2, 1, 1)
    # How many is not known where there is nothing yet.
    with pytest.raises(ResourceError, match="--workers"):
        choose_placement(None, None, 1.0, [node(1)], may_grow=True)


def room(name: str, gpus: float, cpus: float = 64, *, of: float | None = None) -> NodeRoom:
    """A node with so many GPUs free of those it has."""
    total = {"CPU": 64.0, "GPU": of if of is not None else gpus}
    return NodeRoom(name, f"10.0.0.{name}", total, {"CPU": cpus, "GPU": gpus})


@pytest.mark.parametrize(
    ("workers", "gpus", "counts"),
    [
        (8, [4, 8, 4], {"1": 8}),
        # The smallest node that holds all, not the roomiest: larger ones stay whole for others.
        (4, [8, 4, 4], {"1": 4}),
        (3, [4, 8, 2], {"0": 3}),
        (10, [4, 8, 2], {"1": 8, "2": 2}),
        (12, [4, 4, 8], {"2": 8, "0": 4}),
        (14, [4, 8, 4], {"1": 8, "0": 4, "2": 2}),
        (16, [4, 8, 4], {"1": 8, "0": 4, "2": 4}),
        (5, [0, 3, 4], {"2": 4, "1": 1}),
    ],
)
def test_as_few_nodes_as_possible_take_part(
    workers: int, gpus: list[int], counts: dict[str, int]
) -> None:
    rooms = [room(str(number), free) for number, free in enumerate(gpus)]
    chosen = pack(Placement(workers, 1, 1), rooms)
    assert chosen is not None
    assert {name: chosen.count(name) for name in chosen} == counts
    # A node's ranks follow each other.
    assert chosen == sorted(chosen, key=list(counts).index)


@given(free=st.lists(st.integers(0, 9), min_size=1, max_size=7), workers=st.integers(1, 40))
def test_packing_takes_the_fewest_nodes_and_no_more_than_they_have(
    free: list[int], workers: int
) -> None:
    rooms = [room(str(number), gpus) for number, gpus in enumerate(free)]
    chosen = pack(Placement(workers, 1, 1), rooms)
    if chosen is None:
        assert sum(free) < workers
        return
    assert len(chosen) == workers
    assert all(chosen.count(str(number)) <= gpus for number, gpus in enumerate(free))
    fewest = next(n for n in range(1, 9) if sum(sorted(free)[-n:]) >= workers)
    assert len(set(chosen)) == fewest


def test_cpus_limit_a_node_as_gpus_do() -> None:
    assert pack(Placement(4, 2, 1), [room("0", 4, cpus=5), room("1", 4)]) == ["1"] * 4
    assert pack(Placement(2, 2, 0), [room("0", 0, cpus=3), room("1", 0, cpus=2)]) == ["0", "1"]
    assert pack(Placement(1, 2, 1), [room("0", 4, cpus=1)]) is None


def test_workers_without_gpus_leave_nodes_with_gpus_alone_where_they_can() -> None:
    rooms = [room("0", 4, cpus=8), room("1", 0, cpus=8), room("2", 8, cpus=8)]
    assert pack(Placement(8, 1, 0), rooms) == ["1"] * 8
    assert pack(Placement(9, 1, 0), rooms) == ["1"] * 8 + ["0"]


def test_what_is_free_and_what_is_missing_is_told_per_node() -> None:
    rooms = [room("1", 3, cpus=2, of=4), room("2", 0, of=8)]
    text = shortage(Placement(4, 1, 1), rooms)
    for part in (
        "4 workers of 1 CPU and 1 GPU each find room for 2 on 2 nodes",
        "10.0.0.1 has 2 of 64 CPU and 3 of 4 GPU free, for 2; one more lacks 1 CPU",
        "10.0.0.2 has 64 of 64 CPU and 0 of 8 GPU free, for 0; one more lacks 1 GPU",
        "missing in all: 2 CPU and 2 GPU for 2 more",
    ):
        assert part in text
    assert "\n" not in text


def test_a_large_cluster_is_told_in_short() -> None:
    text = shortage(Placement(400, 1, 1), [room(str(number), 2) for number in range(100)])
    assert "find room for 200 on 100 nodes" in text
    assert "88 more nodes, for 176" in text
    assert len(text) < 2000


def test_the_nodes_of_a_cluster_and_what_is_free_on_them() -> None:
    nodes = [
        node(4) | {"NodeID": "a", "NodeManagerAddress": "10.0.0.1"},
        node(4) | {"NodeID": "b", "NodeManagerAddress": "10.0.0.2"},
        node(4, alive=False) | {"NodeID": "c", "NodeManagerAddress": "10.0.0.3"},
    ]
    rooms = node_rooms(nodes, {"a": {"CPU": 3.0}})
    assert [(r.id, r.address, r.holds(Placement(9, 1, 0))) for r in rooms] == [
        ("a", "10.0.0.1", 3),
        ("b", "10.0.0.2", 0),
    ]


def after_loss(workers: int, nodes: list[Any], **changed: Any) -> Placement | None:
    """Four workers of two threads were wanted, and `workers` of them ran last."""
    options: dict[str, Any] = {"waited": 0.0, "node_wait": 10.0, "on_lost_node": "wait"} | changed
    return placement_after_loss(Placement(4, 2, 0), Placement(workers, 2, 0), nodes, **options)


def test_a_node_is_waited_for_while_the_others_have_no_room() -> None:
    assert after_loss(4, [node(4), node(4, alive=False)]) is None
    assert after_loss(4, [node(4), node(4)]) == Placement(4, 2, 0)
    # The others' spare cores do as well as the node.
    assert after_loss(4, [node(8), node(4, alive=False)]) == Placement(4, 2, 0)


@pytest.mark.parametrize(("nodes", "workers"), [([node(4)], 2), ([node(7), node(1)], 3)])
def test_after_the_wait_fewer_workers_go_on_if_they_may(nodes: list[Any], workers: int) -> None:
    shrunk = after_loss(4, nodes, waited=10.0, on_lost_node="shrink")
    assert shrunk == Placement(workers, 2, 0)
    with pytest.raises(ResourceError) as caught:
        after_loss(4, nodes, waited=10.0)
    for text in ("4 workers", f"hold {workers}", "10 s", "same command", "--on-lost-node shrink"):
        assert text in str(caught.value)


def test_a_shrunk_job_grows_back_and_does_not_wait_to_stay_as_it_is() -> None:
    assert after_loss(2, [node(4)]) == Placement(2, 2, 0)
    assert after_loss(2, [node(4), node(2)]) == Placement(3, 2, 0)
    assert after_loss(2, [node(40)]) == Placement(4, 2, 0)


@pytest.mark.parametrize("on_lost_node", ["wait", "shrink"])
def test_no_room_for_a_single_worker(on_lost_node: str) -> None:
    with pytest.raises(ResourceError, match="hold 0"):
        after_loss(4, [node(1)], waited=10.0, on_lost_node=on_lost_node)
