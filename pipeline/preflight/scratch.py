"""Whether the scratch of each node has space for the activations of its workers."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.records.scratch import FreeScratch
from storage.errors import ResourceError

_SLACK_BYTES = 16 << 20


def check_scratch_space(workers: Sequence[FreeScratch], store: float, *, stores: int = 2) -> None:
    """Raises `ResourceError` where a node's scratch cannot hold its share of activation stores.

    workers: the free scratch of each worker. store: bytes of one activation store. stores: how many
    there are at a time.
    """
    for place in {worker.place for worker in workers}:
        here = [worker for worker in workers if worker.place == place]
        scratch = here[0]
        needed = stores * store * len(here) / len(workers) + _SLACK_BYTES
        if scratch.free + scratch.held < needed:
            raise ResourceError(
                f"{scratch.folder} on {scratch.host}: activations need about "
                f"{needed / 1e9:.2f} GB, {scratch.free / 1e9:.2f} GB are free; choose another "
                "--scratch-dir, or lower --nsamples or --seqlen"
            )
