"""What a phase of a plan is made of: parts, each of one kind of work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.planning.memory import Held

COMPUTE, BANDWIDTH, LATENCY = "compute", "bandwidth", "latency"
DISK, HASH, NETWORK, HOST = "disk", "hashing", "network", "host copy"


@dataclass(frozen=True)
class PhasePart:
    """Seconds of one kind of work, and what sets its pace."""

    what: str
    limit: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase: its parts, its peak memory (bytes of a worker's device and of its host process),
    and what all ranks together read, write and send, in bytes."""

    name: str
    parts: tuple[PhasePart, ...]
    held: Held = field(default_factory=lambda: Held(0.0))
    read: float = 0.0
    written: float = 0.0
    sent: float = 0.0

    @property
    def seconds(self) -> float:
        """Wall seconds."""
        return sum(part.seconds for part in self.parts)

    @property
    def limit(self) -> str:
        """What takes most of the phase."""
        totals: dict[str, float] = {}
        for part in self.parts:
            totals[part.limit] = totals.get(part.limit, 0.0) + part.seconds
        return max(totals, key=lambda limit: totals[limit]) if totals else LATENCY


def merge(parts: Iterable[PhasePart]) -> tuple[PhasePart, ...]:
    """Parts of the same name and limit as one."""
    totals: dict[tuple[str, str], float] = {}
    for part in parts:
        key = (part.what, part.limit)
        totals[key] = totals.get(key, 0.0) + part.seconds
    return tuple(PhasePart(what, limit, seconds) for (what, limit), seconds in totals.items())
