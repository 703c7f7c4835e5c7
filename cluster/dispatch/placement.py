"""How many workers, and what each one gets: pure decisions on what the cluster says it has."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.dispatch.scratch_nodes import Node, back_on_nodes
from storage.errors import ResourceError

# Of how many nodes a message tells one by one.
_SHOWN_NODES = 12


@dataclass(frozen=True)
class Placement:
    """`workers` ranks of `threads` CPUs and `gpus` GPUs each."""

    workers: int
    threads: int
    gpus: float

    def bundle(self) -> dict[str, float]:
        """What one rank asks of Ray."""
        bundle: dict[str, float] = {"CPU": self.threads}
        if self.gpus:
            bundle["GPU"] = self.gpus
        return bundle

    def text(self) -> str:
        """The same for people."""
        return " and ".join(f"{amount:g} {kind}" for kind, amount in self.bundle().items())


def choose_placement(
    workers: int | None,
    threads: int | None,
    gpus_per_worker: float | None,
    nodes: Sequence[Mapping[str, Any]],
    *,
    may_grow: bool = False,
) -> Placement:
    """Fills in what the user left open from `ray.nodes()`.

    GPUs where there are any, one worker each; else one worker per node, its cores divided by the
    workers on it. may_grow: a number of workers that was asked for is taken although the cluster
    has no room for it yet. Raises `ResourceError` for more than the cluster has, naming both.
    """
    alive = _alive(nodes)
    has_gpus = any(resources.get("GPU", 0) >= 1 for resources in alive)
    gpus = gpus_per_worker if gpus_per_worker is not None else float(has_gpus)
    if workers is None:
        workers = (
            _slots(alive, threads or 1, gpus)
            if gpus
            else sum(resources.get("CPU", 0) >= (threads or 1) for resources in alive)
        )
    cores = int(sum(resources.get("CPU", 0) for resources in alive))
    if threads is None:
        threads = 1 if gpus else max(1, cores // max(workers, 1))
        # Workers that fit in sum may not fit on each node: a node's spare cores are no one's.
        while threads > 1 and _slots(alive, threads, gpus) < workers:
            threads -= 1
    slots = _slots(alive, threads, gpus)
    if workers < 1 or (slots < workers and not may_grow):
        wanted = Placement(max(workers, 1), threads, gpus)
        raise ResourceError(
            f"{max(workers, 1)} workers of {wanted.text()} each are more than the cluster's "
            f"{len(alive)} nodes hold ({slots}); lower --workers, --threads or --gpus-per-worker"
        )
    return Placement(workers, threads, gpus)


def placement_after_loss(
    wanted: Placement,
    current: Placement,
    nodes: Sequence[Mapping[str, Any]],
    *,
    waited: float,
    node_wait: float,
    on_lost_node: Literal["wait", "shrink"],
) -> Placement | None:
    """What to go on with after a node was lost; None: wait, and ask again.

    `wanted` is what the job began with and `current` what it had last, which is less if it has
    shrunk before. Workers keep their threads and GPUs; only their number changes, and it grows
    back to `wanted` where there is room. `waited`: seconds since the loss, of `node_wait`.

    Raises `ResourceError` when the wait is over and there is still no room: for `current`, or
    with "shrink" for a single worker.
    """
    alive = _alive(nodes)
    room = min(_slots(alive, wanted.threads, wanted.gpus), wanted.workers)
    if room >= current.workers:
        return dataclasses.replace(wanted, workers=room)
    if waited < node_wait:
        return None
    if on_lost_node == "shrink" and room >= 1:
        return dataclasses.replace(wanted, workers=room)
    shrink = f", or go on with {room}: --on-lost-node shrink" if room else ""
    raise ResourceError(
        f"{current.workers} workers of {wanted.text()} each ran here, but the {len(alive)} nodes "
        f"that are left hold {room}, and none came back in {node_wait:g} s (--node-wait); "
        f"committed blocks are kept: bring the missing node back and run the same command "
        f"again{shrink}"
    )


@dataclass(frozen=True)
class NodeRoom:
    """A living node: Ray's id, its address for people, what it has and what of that is free."""

    id: str
    address: str
    total: Mapping[str, float]
    free: Mapping[str, float]

    def holds(self, placement: Placement) -> int:
        """Workers that fit in what is free."""
        return _slots([self.free], placement.threads, placement.gpus)

    def text(self, placement: Placement) -> str:
        """What is free, for how many workers, and what one more would need besides."""
        kinds = placement.bundle()
        free = " and ".join(
            f"{self.free.get(kind, 0):g} of {self.total.get(kind, 0):g} {kind}" for kind in kinds
        )
        holds = self.holds(placement)
        lacks = {
            kind: (holds + 1) * amount - self.free.get(kind, 0) for kind, amount in kinds.items()
        }
        lacking = " and ".join(f"{amount:g} {kind}" for kind, amount in lacks.items() if amount > 0)
        return f"{self.address} has {free} free, for {holds}; one more lacks {lacking}"


def node_rooms(
    nodes: Sequence[Mapping[str, Any]], available: Mapping[str, Mapping[str, float]]
) -> list[NodeRoom]:
    """The living nodes of `ray.nodes()`; `available`: node id -> free resources, where known."""
    return [
        NodeRoom(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            total=node["Resources"],
            free=available.get(node["NodeID"], {}),
        )
        for node in nodes
        if node.get("Alive")
    ]


def pack(
    placement: Placement, rooms: Sequence[NodeRoom], before: Sequence[Node] = ()
) -> list[str] | None:
    """The node (by id) of each rank, on as few nodes as possible; None without room for all.

    before: where each rank was before, if known; whoever finds room there goes back. For the others
    the nodes that take part already are filled, then the roomiest, but the last taken is the
    smallest that holds the rest: larger ones stay whole for others. Ranks of one node that have no
    home follow each other.
    """
    slots = [room for room in rooms for _ in range(room.holds(placement))]
    back = back_on_nodes(before[: placement.workers], [(room.id, room.address) for room in slots])
    chosen = {rank: slots[slot].id for rank, slot in back.items()}
    taken = Counter(chosen.values())
    left = {room.id: room.holds(placement) - taken[room.id] for room in rooms}

    def spare(room: NodeRoom) -> tuple[float, str]:
        """Of nodes that serve alike, those without GPUs come first where none are asked for."""
        return (0.0 if placement.gpus else room.total.get("GPU", 0.0), room.id)

    open_rooms = [room for room in rooms if left[room.id]]
    others = [rank for rank in range(placement.workers) if rank not in chosen]
    while others:
        if not open_rooms:
            return None
        here = [room for room in open_rooms if room.id in taken]
        enough = [room for room in open_rooms if left[room.id] >= len(others)]
        if enough and not here:
            room = min(enough, key=lambda room: (left[room.id], *spare(room)))
        else:
            room = min(here or open_rooms, key=lambda room: (-left[room.id], *spare(room)))
        open_rooms.remove(room)
        for rank in others[: left[room.id]]:
            chosen[rank] = room.id
        others = others[left[room.id] :]
    return [chosen[rank] for rank in range(placement.workers)]


def shortage(placement: Placement, rooms: Sequence[NodeRoom]) -> str:
    """What is free and what is missing, per node, for people; on one line."""
    held = sum(room.holds(placement) for room in rooms)
    missing = max(placement.workers - held, 0)
    lacking = " and ".join(f"{missing * n:g} {kind}" for kind, n in placement.bundle().items())
    shown = sorted(rooms, key=lambda room: (-room.holds(placement), room.address))
    texts = [room.text(placement) for room in shown[:_SHOWN_NODES]]
    if len(shown) > _SHOWN_NODES:
        rest = sum(room.holds(placement) for room in shown[_SHOWN_NODES:])
        texts.append(f"{len(shown) - _SHOWN_NODES} more nodes, for {rest}")
    return (
        f"{placement.workers} workers of {placement.text()} each find room for {held} on "
        f"{len(rooms)} nodes: {'; '.join(texts)}; missing in all: {lacking} for {missing} more"
    )


def _alive(nodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, float]]:
    """Resources of the nodes that live, as `ray.nodes()` tells."""
    return [node["Resources"] for node in nodes if node.get("Alive")]


def _slots(nodes: Sequence[Mapping[str, float]], threads: int, gpus: float) -> int:
    """Workers that fit, node by node."""
    return sum(
        int(
            min(
                node.get("CPU", 0) // threads,
                node.get("GPU", 0) // gpus if gpus else float("inf"),
            )
        )
        for node in nodes
    )
