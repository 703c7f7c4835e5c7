"""Before compute: whether each node's scratch holds its ranks' activations."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.records.scratch import FreeScratch
from storage.errors import ResourceError

_SLACK_BYTES = 16 << 20


def check_scratch_room(rooms: Sequence[FreeScratch], store: float) -> None:
    """Raises `ResourceError` where a node's scratch cannot hold its ranks' part of two stores.

    store: bytes of all activations of a block.
    """
    for place in {room.place for room in rooms}:
        own = [room for room in rooms if room.place == place]
        needed = 2 * store * len(own) / len(rooms) + _SLACK_BYTES
        if own[0].free + own[0].held < needed:
            raise ResourceError(
                f"{own[0].folder} on {own[0].host}: activations need about {needed / 1e9:.2f} GB, "
                f"{own[0].free / 1e9:.2f} GB are free; choose another --scratch-dir, or lower "
                "--nsamples or --seqlen"
            )
