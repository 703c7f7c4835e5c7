"""Room on the cluster for all ranks at once: packed on few nodes, waited for, asked for."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from cluster.dispatch.placement import NodeRoom, Placement, node_rooms, pack, shortage
from cluster.dispatch.scratch_nodes import Node, back_on_nodes, bundles_by_node
from storage.errors import ResourceError

# Every node bears this label; a bundle that selects by it goes nowhere else.
_NODE_LABEL = "ray.io/node-id"
# Room that was seen free a moment ago is reserved in less, or someone else was quicker.
_QUICK_SECONDS = 5.0
_LOOK_SECONDS = 1.0
# What another driver's workers, or our own last, held may be counted as theirs for so long.
_NOTICE_SECONDS = 2.0


@dataclass(frozen=True)
class Reservation:
    """A placement group; by rank, the id of its node and its bundle in the group."""

    group: Any
    nodes: tuple[str, ...]
    bundles: tuple[int, ...]

    def release(self) -> None:
        """Gives the room back; what still runs there ends."""
        remove_placement_group(self.group)


def reserve(
    placement: Placement,
    timeout: float,
    note: Callable[[str], None],
    before: Sequence[Node] = (),
) -> Reservation:
    """Room for every rank, on as few nodes as possible, waited for `timeout` seconds at most.

    before: the node that each rank was on, which it gets again where there is room (see `pack`).
    While there is none, a pending placement group says so to Ray: an autoscaler adds nodes for it,
    and it is served when others let go. `note` is told, once, what is free and what is missing.
    Raises `ResourceError` with the same when the time is over.
    """
    nodes = pack(placement, free_rooms(), before)
    if nodes is not None:
        placed = _placed(_group(placement, nodes), _QUICK_SECONDS, before)
        if placed is not None:
            return placed

    def waiting() -> None:
        note(f"{shortage(placement, free_rooms())}; waiting {timeout:g} s (--placement-timeout)")

    placed = _placed(_group(placement, None), timeout, before, waiting)
    if placed is None:
        raise ResourceError(
            f"{shortage(placement, free_rooms())}; the cluster made no room in {timeout:g} s "
            "(--placement-timeout): lower --workers, --threads or --gpus-per-worker, or let other "
            "jobs end"
        )
    return _packed_better(placement, placed, before)


@contextlib.contextmanager
def growth_requested(placement: Placement) -> Iterator[None]:
    """While inside, a pending placement group asks an autoscaler for room for all ranks.

    Unlike `ray.autoscaler.sdk.request_resources` it ends with this driver, however that ends, and
    counts what others hold.
    """
    group = _group(placement, None)
    try:
        yield
    finally:
        with contextlib.suppress(RayError):
            remove_placement_group(group)


def free_rooms() -> list[NodeRoom]:
    """The living nodes, with what is free on each."""
    nodes = ray.nodes()
    available: Mapping[str, Mapping[str, float]]
    try:
        available = available_resources_per_node()
    except RayError:
        # A Ray Client (`ray://`) is not told: what is taken shows when Ray makes no room.
        available = {node["NodeID"]: node["Resources"] for node in nodes}
    return node_rooms(nodes, available)


def _group(placement: Placement, nodes: Sequence[str] | None) -> Any:
    """A placement group, pending; on those nodes, or wherever Ray finds or makes room."""
    pinned: dict[str, Any] = {}
    if nodes is not None:
        pinned["bundle_label_selector"] = [{_NODE_LABEL: node} for node in nodes]
    # Names are unique, and there may be two for a moment.
    name = f"prox24-{secrets.token_hex(4)}"
    bundles = [placement.bundle()] * placement.workers
    return placement_group(bundles, strategy="PACK", name=name, **pinned)


def _placed(
    group: Any, timeout: float, before: Sequence[Node], waiting: Callable[[], None] = lambda: None
) -> Reservation | None:
    """The group once Ray has placed it; None, and no group any more, if it does not in time.

    `waiting` is called once, if it takes longer than room takes that is there.
    """
    began, noted = time.monotonic(), False
    # In steps: a signal is heard only between them.
    while not group.wait(_LOOK_SECONDS):
        waited = time.monotonic() - began
        if waited > timeout:
            remove_placement_group(group)
            return None
        if waited > _NOTICE_SECONDS and not noted:
            noted = True
            waiting()
    nodes = placement_group_table(group)["bundles_to_node_id"]
    addresses = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes()}
    places = [(nodes[index], addresses.get(nodes[index], "")) for index in sorted(nodes)]
    bundles = bundles_by_node(before, places)
    return Reservation(group, tuple(places[bundle][0] for bundle in bundles), tuple(bundles))


def _packed_better(
    placement: Placement, placed: Reservation, before: Sequence[Node]
) -> Reservation:
    """`placed`, or a reservation with more ranks on the nodes they were on, or with as many and on
    fewer nodes, where there is room for it beside `placed`."""
    rooms = free_rooms()
    nodes = pack(placement, rooms, before)
    if nodes is None:
        return placed
    addresses = {room.id: room.address for room in rooms}

    def value(chosen: Sequence[str]) -> tuple[int, int]:
        places = [(node, addresses.get(node, "")) for node in chosen]
        return len(back_on_nodes(before, places)), -len(set(chosen))

    if value(nodes) <= value(placed.nodes):
        return placed
    better = _placed(_group(placement, nodes), _QUICK_SECONDS, before)
    if better is None:
        return placed
    placed.release()
    return better
