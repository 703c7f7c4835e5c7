"""The scale of a reconstruction's losses: what they would be if the block's output were 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.reconstruct.gradients import squared_error
from pipeline.reconstruct.schedule import held_out
from pipeline.worker.forward import Forward
from storage.files.hashing import StoredFile
from storage.run.activations import open_activation_shard


def held_out_energy(
    forward: Forward, block: int, targets: Sequence[StoredFile], nsamples: int
) -> dict[int, float]:
    """Mean square of the targets' elements, of each held-out sequence of this rank, by number.

    targets: of `block`'s outputs, by number of the activation shard. nsamples: of the calibration.
    """
    counted, judged = forward.counted(), set(held_out(nsamples))
    found: dict[int, float] = {}
    for index, (start, stop) in forward.rank_shards():
        numbers = judged & set(range(start, stop))
        if not numbers:
            continue
        # Not compared with its hash: `begin_training` does that, and reads the same file.
        path = forward.store.chain(dense=True).activations(block + 1) / targets[index].name
        shard = open_activation_shard(path, sha256=None)
        for number in numbers:
            target = shard.read(number - start, number - start + 1)
            some = None if counted is None else counted[number : number + 1].to(target.device)
            found[number] = float(squared_error(torch.zeros_like(target), target, some))
    return found
