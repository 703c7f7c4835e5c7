"""Which sequences each step of a reconstruction takes, and its learning rate: pure functions.

None of it depends on the number of workers. A step takes a sequence from each of as many stretches
of the calibration as it has sequences, and workers hold stretches of it: so each has a like share
of every step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from pipeline.runtime.split import in_passes

# One of so many calibration sequences takes no part in the gradients: its loss decides.
HELD_OUT_SHARE = 10
# The mask of `exchange` is fixed after this share of the steps.
EXCHANGE_SHARE = 0.6
# Weights that are trained at once: a worker has a gradient (2 or 4 bytes) of each. It does not
# depend on the machine, because the division decides the bytes of the result.
MOST_WEIGHTS = 1 << 32
# Gradients that are exchanged together. It bounds the memory of it, and decides no byte.
BUNDLE_BYTES = 1 << 26
# Epochs without a lower loss of the held-out sequences after which a reconstruction ends.
PATIENCE = 3


def held_out(nsamples: int) -> list[int]:
    """Numbers of the sequences that only judge: a tenth of them, evenly spaced, at least one.

    Raises ValueError for fewer than two sequences: none would be left to learn from.
    """
    if nsamples < 2:
        raise ValueError(f"{nsamples} sequences cannot be divided")
    count = max(1, nsamples // HELD_OUT_SHARE)
    return [(2 * number + 1) * nsamples // (2 * count) for number in range(count)]


def steps_of_epoch(nsamples: int, batch: int, epoch: int, seed: int) -> list[list[int]]:
    """The sequences of each step of an epoch, ascending; together all that are not held out.

    batch: sequences of a step; the last steps may have fewer. seed: of the order.
    """
    left_out = set(held_out(nsamples))
    learn = [number for number in range(nsamples) if number not in left_out]
    strata = min(batch, len(learn))
    order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    columns = []
    for number in range(strata):
        part = learn[number * len(learn) // strata : (number + 1) * len(learn) // strata]
        columns.append([part[i] for i in torch.randperm(len(part), generator=order).tolist()])
    longest = max(map(len, columns))
    return [[part[k] for part in columns if k < len(part)] for k in range(longest)]


def steps_in_epoch(nsamples: int, batch: int) -> int:
    """How many steps an epoch has."""
    learn = nsamples - len(held_out(nsamples))
    return -(-learn // min(batch, learn))


def rate(step: int, steps: int) -> float:
    """Factor of the learning rate in step number `step`, from 0: 1, falling linearly to 1/steps."""
    return 1 - step / steps


def freezes(step: int, steps: int) -> bool:
    """Whether the mask of `exchange` is fixed from step number `step` on."""
    return step >= EXCHANGE_SHARE * steps


def parts(sizes: Mapping[str, int]) -> list[list[str]]:
    """The layers of a block, divided into parts that are trained one after another, in order.

    sizes: layer -> its number of weights. A part has at most `MOST_WEIGHTS` weights, or one layer.
    """
    return in_passes(sizes, MOST_WEIGHTS)


def goes_on(losses: Sequence[float], epochs: int) -> bool:
    """Whether another epoch may lower the loss of the held-out sequences.

    losses: before the first epoch and after each. epochs: at most. False where the last of them is
    not finite, or the lowest is `PATIENCE` epochs old. While the rate is high and weights change
    places, the loss may rise, and most of what it falls by comes later: these epochs are counted
    from `EXCHANGE_SHARE` of all on.
    """
    if not math.isfinite(losses[-1]):
        return False
    lowest = min(range(len(losses)), key=lambda index: losses[index])
    return len(losses) - 1 - max(lowest, EXCHANGE_SHARE * epochs) < PATIENCE
