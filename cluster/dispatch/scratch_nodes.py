"""Ranks back where their activations are: on the nodes whose scratch they wrote to.

A rank on another node than before makes its activations again from the tokens, through all of the
committed blocks. So its node counts for more than how many nodes take part.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

Node = tuple[str, str]
"""A node: Ray's id, and the address, which is the same when Ray was started anew; "" if unknown."""


def spread(before: Sequence[Node], world: int) -> list[Node]:
    """The nodes that `world` ranks belong to where another number of ranks was on `before`.

    A rank's sequences follow one another: it belongs where the middle of its sequences was.
    """
    count = len(before)
    return [before[(2 * rank + 1) * count // (2 * world)] for rank in range(world)] if count else []


def back_on_nodes(before: Sequence[Node], slots: Sequence[Node]) -> dict[int, int]:
    """Rank → a slot on the node it was on, for as many ranks as find one; no slot twice.

    before: the node of each rank, as far as known. slots: the node of each slot. A node is known by
    its id, or else by its address.
    """
    chosen: dict[int, int] = {}
    for part in (0, 1):
        free: dict[str, deque[int]] = defaultdict(deque)
        taken = set(chosen.values())
        for slot, node in enumerate(slots):
            if slot not in taken:
                free[node[part]].append(slot)
        for rank, node in enumerate(before):
            if rank not in chosen and node[part] and free[node[part]]:
                chosen[rank] = free[node[part]].popleft()
    return chosen


def bundles_by_node(before: Sequence[Node], places: Sequence[Node]) -> list[int]:
    """The bundle of each rank, so that as many as possible are on the node they were on before.

    before: as in `back_on_nodes`. places: the node of each bundle, one per rank. The other ranks
    get the bundles that are left, in order.
    """
    chosen = back_on_nodes(before[: len(places)], places)
    taken = set(chosen.values())
    rest = iter([bundle for bundle in range(len(places)) if bundle not in taken])
    return [chosen[rank] if rank in chosen else next(rest) for rank in range(len(places))]
