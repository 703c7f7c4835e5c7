"""What Prometheus sees of a job: the metrics, and who records them.

Every metric has the label `run`, the name of the run directory. Ray exports them from each node's
metrics port with the prefix `ray_`, and counters with the suffix `_total`. Units are Prometheus'
base units: seconds, bytes, ratios from 0 to 1. Throughput is for the reader to divide: tokens per
second are `rate(tokens) / rate(work_seconds{kind="forward"})`.

Ranks record what they do; the driver, what the job as a whole does. Without Ray's metrics agent
(`ray` installed without its `default` extra) nothing is exported, and nothing fails.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.metrics import Counter, Gauge

from pipeline.messages import Outcome

_BYTES = "_bytes"
# Ray's agents forget a gauge after two reports, which come every 10 s.
_REFRESH_SECONDS = 5.0


@dataclass(frozen=True)
class Description:
    """A metric as it is registered with Ray; `labels` besides `run`."""

    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


METRICS: dict[str, Description] = {
    "prox24_blocks": Description("gauge", "Blocks of the model."),
    "prox24_blocks_done": Description("gauge", "Blocks that are committed."),
    "prox24_block": Description("gauge", "Number of the block in work."),
    "prox24_phase": Description("gauge", "1 for the phase in work, 0 for the others.", ("phase",)),
    "prox24_relative_error_ratio": Description(
        "gauge", "Relative error of a committed block, 0 to 1.", ("block",)
    ),
    "prox24_retries": Description("counter", "Attempts that failed and were made again."),
    "prox24_tokens": Description("counter", "Tokens that blocks were run on.", ("rank",)),
    "prox24_solved_weights": Description("counter", "Weights that were solved.", ("rank",)),
    "prox24_work_seconds": Description(
        "counter", "Seconds of a rank by kind of work.", ("rank", "kind")
    ),
    "prox24_moved_bytes": Description(
        "counter", "Bytes that a rank read, wrote or sent to others.", ("rank", "kind")
    ),
    "prox24_peak_memory_bytes": Description(
        "gauge", "Peak memory of a rank in its last phase, of the host or its GPU.",
        ("rank", "kind"),
    ),
}  # fmt: skip


def exported_name(name: str) -> str:
    """A metric's name in Prometheus."""
    return f"ray_{name}" + ("_total" if METRICS[name].kind == "counter" else "")


class Meter:
    """Records metrics of one run in a process that is connected to Ray."""

    def __init__(self, run: str, refresh_seconds: float = _REFRESH_SECONDS) -> None:
        self._run, self._refresh_seconds = run, refresh_seconds
        self._made: dict[str, Counter | Gauge] = {}
        # What each gauge was last set to, by name and labels.
        self._last: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._lock = threading.Lock()
        self._refresher: threading.Thread | None = None

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge, and keeps it set: Ray drops one that is not set again for 20 s."""
        with self._lock:
            self._last[name, frozenset(labels.items())] = value
            self._record(name, value, labels)
        if self._refresher is None:
            self._refresher = threading.Thread(target=self._refresh, daemon=True)
            self._refresher.start()

    def _refresh(self) -> None:
        while True:
            time.sleep(self._refresh_seconds)
            if not ray.is_initialized():
                continue
            with self._lock:
                for (name, labels), value in self._last.items():
                    self._record(name, value, dict(labels))

    def _record(self, name: str, value: float, labels: Mapping[str, str]) -> None:
        metric = self._metric(name)
        if isinstance(metric, Gauge):
            metric.set(value, tags={"run": self._run, **labels})

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Adds to a counter; nothing where `amount` is 0."""
        metric = self._metric(name)
        if isinstance(metric, Counter) and amount > 0:
            metric.inc(amount, tags={"run": self._run, **labels})

    def outcome(self, rank: int, outcome: Outcome[Any]) -> None:
        """Records what a rank did in a phase."""
        own = str(rank)
        for kind, seconds in outcome.seconds.items():
            self.add("prox24_work_seconds", seconds, rank=own, kind=kind)
        for name, amount in moved(outcome.counts).items():
            self.add("prox24_moved_bytes", amount, rank=own, kind=name)
        self.add("prox24_tokens", outcome.counts.get("tokens", 0), rank=own)
        self.add("prox24_solved_weights", outcome.counts.get("solved_weights", 0), rank=own)
        for key, kind in (("rss_bytes", "host"), ("device_bytes", "device")):
            if key in outcome.memory:
                self.set("prox24_peak_memory_bytes", outcome.memory[key], rank=own, kind=kind)

    def _metric(self, name: str) -> Counter | Gauge:
        if name not in self._made:
            described = METRICS[name]
            make: Any = Counter if described.kind == "counter" else Gauge
            labels = ("run", *described.labels)
            self._made[name] = make(name, description=described.help, tag_keys=labels)
        return self._made[name]


def moved(counts: Mapping[str, int]) -> dict[str, int]:
    """Of what was counted, the bytes that were moved, by kind: `statistics_sent`."""
    return {
        name.removesuffix(_BYTES): amount
        for name, amount in counts.items()
        if name.endswith(_BYTES) and name != "statistics_bytes"
    }
