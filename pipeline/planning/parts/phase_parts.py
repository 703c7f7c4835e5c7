"""A phase of a plan, and its parts, each of one kind of work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.planning.memory import PeakBytes

COMPUTE, BANDWIDTH, LATENCY = "compute", "bandwidth", "latency"
DISK, HASH, NETWORK, HOST = "disk", "hashing", "network", "host copy"


@dataclass(frozen=True)
class PhasePart:
    """Seconds of one kind of work, and what limits its speed (one of the constants above)."""

    what: str
    limit: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of one block, or of the whole job.

    parts: one after another. peak: peak bytes of tensors of a worker. read, written, sent: bytes of
    all workers together.
    """

    name: str
    parts: tuple[PhasePart, ...]
    peak: PeakBytes = field(default_factory=lambda: PeakBytes(0.0))
    read: float = 0.0
    written: float = 0.0
    sent: float = 0.0

    @property
    def seconds(self) -> float:
        """Wall seconds."""
        return sum(part.seconds for part in self.parts)

    @property
    def limit(self) -> str:
        """What limits the largest share of the phase's time."""
        totals: dict[str, float] = {}
        for part in self.parts:
            totals[part.limit] = totals.get(part.limit, 0.0) + part.seconds
        return max(totals, key=lambda limit: totals[limit]) if totals else LATENCY


def merge(parts: Iterable[PhasePart]) -> tuple[PhasePart, ...]:
    """The parts, those of the same name and limit added up."""
    totals: dict[tuple[str, str], float] = {}
    for part in parts:
        key = (part.what, part.limit)
        totals[key] = totals.get(key, 0.0) + part.seconds
    return tuple(PhasePart(what, limit, seconds) for (what, limit), seconds in totals.items())
