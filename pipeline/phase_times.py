"""Where a block's time went, phase by phase, as its record tells."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from pipeline.job import Outcome


@dataclass
class PhaseTimes:
    """Seconds of one phase: wall time at the driver, and each rank's by kind of work.

    `counts`: what each rank counted meanwhile (see `pipeline.measure`). `spans`: each turn's
    `start` in seconds since the epoch, its wall `seconds`, and each rank's seconds in `ranks`.
    """

    wall: float
    ranks: list[dict[str, float]]
    memory: list[dict[str, Any]]
    counts: list[dict[str, int]]
    spans: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values, as stored in records."""
        return dataclasses.asdict(self)


def add_phase(
    times: dict[str, PhaseTimes], phase: str, wall: float, outcomes: list[Outcome]
) -> None:
    """Adds the times of a phase that ends now; a block may take it in several turns."""
    busy = [round(sum(o.seconds.values()), 3) for o in outcomes]
    spans = [{"start": round(time.time() - wall, 3), "seconds": round(wall, 3), "ranks": busy}]
    seconds, memory = [o.seconds for o in outcomes], [o.memory for o in outcomes]
    counts = [o.counts for o in outcomes]
    if phase in times:
        before = times[phase]
        wall += before.wall
        seconds = [_sum(pair) for pair in zip(before.ranks, seconds, strict=True)]
        memory = [_largest(pair) for pair in zip(before.memory, memory, strict=True)]
        counts = [_sum(pair) for pair in zip(before.counts, counts, strict=True)]
        spans = before.spans + spans
    times[phase] = PhaseTimes(wall, seconds, memory, counts, spans)


def _sum(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: sum(p.get(key, 0) for p in parts) for key in _keys(parts)}


def _keys(parts: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(chain(*parts)))


def _largest(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: max(p.get(key, 0) for p in parts) for key in _keys(parts)}
