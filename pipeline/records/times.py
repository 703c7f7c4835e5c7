"""The times of a block's phases, as its records store them, and sums of them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from pipeline.messages import Outcome


@dataclass
class PhaseTimes:
    """Times of one phase, summed over a block's passes.

    wall: seconds at the driver. ranks: by rank, kind of work → seconds. memory: by rank, peak
    bytes. counts: by rank (see `pipeline.runtime.stopwatch`). spans: one entry per pass: `start` in
    seconds since the epoch, wall `seconds`, and in `ranks` the seconds of each rank.
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
    times: dict[str, PhaseTimes], phase: str, wall: float, outcomes: list[Outcome[Any]]
) -> None:
    """Adds to `times` a phase that has just ended after `wall` seconds.

    A phase that a block takes in several passes is summed.
    """
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


@dataclass(frozen=True)
class Work:
    """Phases of a block (see `PhaseTimes.to_json`), and the worker processes, in rank order."""

    block: int
    workers: Sequence[Mapping[str, Any]]
    phases: Mapping[str, dict[str, Any]]


def by_worker(work: Iterable[Work]) -> list[dict[str, Any]]:
    """The committed work of each worker process, in the order of ranks.

    Each entry has `rank`, `host`, `pid`, `node` (Ray's id, if any), the `blocks` that it worked on,
    `seconds` by kind of work, `counts`, and `peak_bytes` of resident memory.
    """
    totals: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in work:
        for rank, worker in enumerate(part.workers):
            key = (worker["host"], worker["pid"], worker.get("node"), rank)
            total = totals.setdefault(key, _no_work(worker, rank))
            total["blocks"].add(part.block)
            for phase in part.phases.values():
                if rank < len(phase["ranks"]):
                    _add(total["seconds"], phase["ranks"][rank])
                    _add(total["counts"], phase["counts"][rank])
                    peak = phase["memory"][rank].get("rss_bytes", 0)
                    total["peak_bytes"] = max(total["peak_bytes"], peak)
    ordered = sorted(totals.values(), key=lambda total: (total["rank"], min(total["blocks"])))
    return [{**total, "blocks": sorted(total["blocks"])} for total in ordered]


def timeline(work: Iterable[Work], workers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The committed phases in order of their start; `workers`: what `by_worker` returns.

    Each entry has `block`, `phase`, `start` in seconds since the epoch, wall `seconds` at the
    driver, and in the order of ranks `workers` (indices) and `busy` (seconds of each).
    """
    numbers = {(w["host"], w["pid"], w["node"], w["rank"]): n for n, w in enumerate(workers)}
    spans = [
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
    return sorted(spans, key=lambda span: float(span["start"]))


def sum_counts(phases: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The counts of these phases, summed over ranks; `statistics_bytes` is that of the largest."""
    total: dict[str, int] = {}
    for phase in phases:
        for counts in phase["counts"]:
            _add(total, counts)
        sizes = [counts.get("statistics_bytes", 0) for counts in phase["counts"]]
        if sum(sizes):
            total["statistics_bytes"] += max(sizes) - sum(sizes)
    return total


def _no_work(worker: Mapping[str, Any], rank: int) -> dict[str, Any]:
    who = {key: worker.get(key) for key in ("host", "pid", "node")}
    return {"rank": rank, **who, "blocks": set(), "seconds": {}, "counts": {}, "peak_bytes": 0}


def _add(total: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        total[key] = total.get(key, 0) + value
