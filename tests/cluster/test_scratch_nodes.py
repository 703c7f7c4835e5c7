"""Which node a rank gets, so that it finds its activations on its node's scratch."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from cluster.dispatch.placement import NodeRoom, Placement, pack
from cluster.dispatch.scratch_nodes import Node, back_on_nodes, bundles_by_node, spread
from pipeline.records.schemas import ACTIVATIONS_SCHEMA
from pipeline.records.scratch import written_by
from storage.files.commit import replace_json
from storage.run.directory import RunDirectory

A, B, C = ("id-a", "10.0.0.1"), ("id-b", "10.0.0.2"), ("id-c", "10.0.0.3")
NODES = st.sampled_from([A, B, C, ("", "")])


def test_ranks_go_back_to_their_nodes() -> None:
    assert bundles_by_node([A, A, B, B], [B, A, B, A]) == [1, 3, 0, 2]


def test_without_homes_the_order_is_rays() -> None:
    assert bundles_by_node([], [A, B, C]) == [0, 1, 2]


def test_a_lost_node_moves_its_own_ranks_alone() -> None:
    assert bundles_by_node([A, B, A, B], [C, A, C, A]) == [1, 0, 3, 2]


def test_nodes_are_known_by_address_when_ray_was_started_anew() -> None:
    anew = [("new-2", B[1]), ("new-1", A[1])]
    assert bundles_by_node([A, B], anew) == [1, 0]
    unknown = [("", ""), B]
    assert bundles_by_node(unknown, [B, A]) == [1, 0]


@given(st.lists(NODES, max_size=6), st.lists(NODES, max_size=6))
def test_every_rank_has_a_bundle_of_its_own(before: list[Node], places: list[Node]) -> None:
    bundles = bundles_by_node(before, places)
    assert sorted(bundles) == list(range(len(places)))
    # As many are at home as the nodes' room allows.
    there = sum(h == places[b] and h[0] != "" for h, b in zip(before, bundles, strict=False))
    ranks = before[: len(places)]
    assert there == sum(min(ranks.count(node), places.count(node)) for node in (A, B, C))


def test_fewer_and_more_ranks_have_the_homes_of_their_sequences() -> None:
    assert spread([A, A, B, B], 2) == [A, B]
    assert spread([A, B, C], 3) == [A, B, C]
    assert spread([A, B, C], 2) == [A, C]
    assert spread([A, B], 4) == [A, A, B, B]
    assert spread([], 4) == []


def room(node: Node, cpus: float) -> NodeRoom:
    return NodeRoom(*node, {"CPU": cpus}, {"CPU": cpus})


def test_homes_count_for_more_than_few_nodes() -> None:
    rooms = [room(A, 1), room(B, 1), room(C, 8)]
    two = Placement(2, 1, 0)
    assert pack(two, rooms) == ["id-c", "id-c"]
    assert pack(two, rooms, [B, A]) == ["id-b", "id-a"]
    # Whose home has no room goes where others are already.
    assert pack(Placement(3, 1, 0), [room(A, 1), room(B, 2), room(C, 2)], [A, B, A]) == [
        *("id-a", "id-b", "id-b")
    ]
    assert pack(Placement(2, 1, 0), [room(A, 1)], [A, A]) is None


@given(
    st.lists(NODES, max_size=6),
    st.tuples(*[st.integers(0, 4)] * 3),
    st.integers(1, 6),
)
def test_packing_takes_home_whoever_finds_room_there(
    before: list[Node], free: tuple[int, ...], workers: int
) -> None:
    rooms = [room(node, cpus) for node, cpus in zip((A, B, C), free, strict=True)]
    chosen = pack(Placement(workers, 1, 0), rooms, before)
    if chosen is None:
        assert sum(free) < workers
        return
    assert len(chosen) == workers
    for node, cpus in zip((A, B, C), free, strict=True):
        assert chosen.count(node[0]) <= cpus
        own = [rank for rank, home in enumerate(before[:workers]) if home == node]
        assert sum(chosen[rank] == node[0] for rank in own) == min(len(own), cpus)


def test_no_slot_is_given_twice() -> None:
    # By its id a slot is one rank's; the same node's address must not give it to another.
    assert back_on_nodes([("id-a", ""), ("old", A[1])], [A]) == {0: 0}


def test_who_wrote_is_read_from_the_newest_record(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert written_by(run) == ()
    for block, workers in (
        (1, [{"node": "x", "node_address": "10.0.0.9"}]),
        (2, [{"node": A[0], "node_address": A[1], "host": "a"}, {"host": "b", "node": 7}]),
    ):
        payload = {"schema_version": ACTIVATIONS_SCHEMA, "shards": [], "workers": workers}
        replace_json(run.activation_record(block), payload)
    assert written_by(run) == (A, ("", ""))
    run.activation_record(2).write_text("{")  # damaged: the one before is better than nothing
    assert written_by(run) == (("x", "10.0.0.9"),)
