"""Ranks back where their activations are: on the nodes whose scratch they wrote to.

A rank on another node than before makes its activations again from the tokens, through all of the
committed blocks. So its node counts for more than how many nodes take part.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

Home = tuple[str, str]
"""A node: Ray's id, and the address, which is the same when Ray was started anew; "" if unknown."""


def spread(homes: Sequence[Home], world: int) -> list[Home]:
    """The homes of `world` ranks where there were others: each rank's sequences follow each other,
    so a rank's home is where the middle of its sequences was."""
    count = len(homes)
    return [homes[(2 * rank + 1) * count // (2 * world)] for rank in range(world)] if count else []


def at_home(homes: Sequence[Home], slots: Sequence[Home]) -> dict[int, int]:
    """Rank → a slot on its own node, for as many ranks as find one; no slot twice.

    homes: the node of each rank, so far as known. slots: the node of each slot. A node is known by
    its id, or else by its address.
    """
    chosen: dict[int, int] = {}
    for part in (0, 1):
        free: dict[str, deque[int]] = defaultdict(deque)
        taken = set(chosen.values())
        for slot, node in enumerate(slots):
            if slot not in taken:
                free[node[part]].append(slot)
        for rank, home in enumerate(homes):
            if rank not in chosen and home[part] and free[home[part]]:
                chosen[rank] = free[home[part]].popleft()
    return chosen


def bundles_at_home(homes: Sequence[Home], places: Sequence[Home]) -> list[int]:
    """The bundle of each rank, so that as many as possible are on the node they were on before.

    homes: as in `at_home`. places: the node of each bundle, one per rank. The others get what is
    left, in order.
    """
    chosen = at_home(homes[: len(places)], places)
    taken = set(chosen.values())
    rest = iter([bundle for bundle in range(len(places)) if bundle not in taken])
    return [chosen[rank] if rank in chosen else next(rest) for rank in range(len(places))]
