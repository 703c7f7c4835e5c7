"""How many workers a job gets of a cluster, and the refusal of more than it has."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import Placement, choose_placement, placement_after_loss
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
