"""Who did what in a job: its phases' figures by worker process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """Phases of a block (see `PhaseTimes.to_json`), and who ran their ranks, in rank order."""

    block: int
    workers: Sequence[Mapping[str, Any]]
    phases: Mapping[str, dict[str, Any]]


def by_worker(work: Iterable[Work]) -> list[dict[str, Any]]:
    """Per worker process, in the order of ranks: what it did in the committed attempts.

    `rank`, `host`, `pid`, `node` (Ray's id, if any), `blocks` that it had a part in, `seconds` by
    kind of work, `counts`, and `peak_bytes` of resident memory.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in work:
        for rank, worker in enumerate(part.workers):
            key = (worker["host"], worker["pid"], worker.get("node"), rank)
            own = found.setdefault(key, _nothing(worker, rank))
            own["blocks"].add(part.block)
            for phase in part.phases.values():
                if rank < len(phase["ranks"]):
                    _add(own["seconds"], phase["ranks"][rank])
                    _add(own["counts"], phase["counts"][rank])
                    peak = phase["memory"][rank].get("rss_bytes", 0)
                    own["peak_bytes"] = max(own["peak_bytes"], peak)
    ordered = sorted(found.values(), key=lambda own: (own["rank"], min(own["blocks"])))
    return [{**own, "blocks": sorted(own["blocks"])} for own in ordered]


def timeline(work: Iterable[Work], workers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The committed phases, by start: which of `workers` (as `by_worker` has them) did what when.

    Each with `block`, `phase`, `start` in seconds since the epoch, wall `seconds` at the driver,
    and, in the order of ranks, `workers` (indices) and `busy` (seconds of each).
    """
    numbers = {(w["host"], w["pid"], w["node"], w["rank"]): n for n, w in enumerate(workers)}
    found = [
        {
            "block": part.block,
            "phase": name,
            "start": span["start"],
            "seconds": span["seconds"],
            "workers": [
                numbers[(worker["host"], worker["pid"], worker.get("node"), rank)]
                for rank, worker in enumerate(part.workers)
            ],
            "busy": span["ranks"],
        }
        for part in work
        for name, phase in part.phases.items()
        for span in phase.get("spans", ())
    ]
    return sorted(found, key=lambda span: float(span["start"]))


def sum_counts(phases: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """What all ranks counted in these phases; `statistics_bytes` is of one rank, not their sum."""
    total: dict[str, int] = {}
    for phase in phases:
        for counts in phase["counts"]:
            _add(total, counts)
        size = max((counts.get("statistics_bytes", 0) for counts in phase["counts"]), default=0)
        own = sum(counts.get("statistics_bytes", 0) for counts in phase["counts"])
        if own:
            total["statistics_bytes"] += size - own
    return total


def _nothing(worker: Mapping[str, Any], rank: int) -> dict[str, Any]:
    who = {key: worker.get(key) for key in ("host", "pid", "node")}
    return {"rank": rank, **who, "blocks": set(), "seconds": {}, "counts": {}, "peak_bytes": 0}


def _add(total: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        total[key] = total.get(key, 0) + value
