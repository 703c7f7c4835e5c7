"""The Prometheus metrics of a job.

Every metric has the label `run`, the name of the run directory (`run_label`). Ray exports metrics
from a port of each node, with the prefix `ray_`, and counters with the suffix `_total`. Units are
the base units of Prometheus: seconds, bytes, ratios from 0 to 1. There is no metric for throughput:
tokens per second are `rate(tokens) / rate(work_seconds{kind="forward"})`.

Workers record their own work, the driver records the state of the job. Without Ray's metrics agent
(`ray` installed without its `default` extra) nothing is exported, and nothing fails.
"""

from __future__ import annotations

import os
import string
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote_from_bytes

import ray
from ray.util.metrics import Counter, Gauge

from pipeline.messages import Outcome

_BYTES = "_bytes"
_IN_LABELS = "".join(set(string.punctuation) - set('%"\\')) + " "
# Ray's agents drop a gauge that was not set during two reports, which are 10 s apart.
_REFRESH_SECONDS = 5.0


@dataclass(frozen=True)
class Description:
    """A metric, as it is registered with Ray. labels: those besides `run`."""

    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


METRICS: dict[str, Description] = {
    "prox24_blocks": Description("gauge", "Blocks of the model."),
    "prox24_blocks_done": Description("gauge", "Blocks that are committed."),
    "prox24_block": Description("gauge", "Number of the block in work."),
    "prox24_epoch": Description("gauge", "Epoch of the present or last reconstruction."),
    "prox24_phase": Description("gauge", "1 for the phase in work, 0 for the others.", ("phase",)),
    "prox24_relative_error_ratio": Description(
        "gauge", "Relative error of a committed block, 0 to 1.", ("block",)
    ),
    "prox24_output_error_ratio": Description(
        "gauge",
        "Held-out error of a block's output, before and after its reconstruction, 0 to 1.",
        ("block", "reconstruction"),
    ),
    "prox24_retries": Description("counter", "Attempts that failed and were made again."),
    "prox24_tokens": Description("counter", "Tokens that blocks were run on.", ("rank",)),
    "prox24_solved_weights": Description("counter", "Weights that were solved.", ("rank",)),
    "prox24_work_seconds": Description(
        "counter", "Seconds of a worker by kind of work.", ("rank", "kind")
    ),
    "prox24_moved_bytes": Description(
        "counter", "Bytes that a worker read, wrote or sent to others.", ("rank", "kind")
    ),
    "prox24_peak_memory_bytes": Description(
        "gauge", "Peak memory of a worker in its last phase, of the host or its GPU.",
        ("rank", "kind"),
    ),
}  # fmt: skip


def exported_name(name: str) -> str:
    """The name of a metric in Prometheus."""
    return f"ray_{name}" + ("_total" if METRICS[name].kind == "counter" else "")


def run_label(name: str) -> str:
    """The label of a run directory's name: Ray takes ASCII only.

    Other characters, and those that Prometheus would have to escape, are written as in a URL, so
    that different names keep different labels: `modèle.run` is `mod%C3%A8le.run`.
    """
    return quote_from_bytes(os.fsencode(name), safe=_IN_LABELS)


class Meter:
    """Records the metrics of one run, in a process that is connected to Ray."""

    def __init__(self, run: str, refresh_seconds: float = _REFRESH_SECONDS) -> None:
        self._run, self._refresh_seconds = run_label(run), refresh_seconds
        self._made: dict[str, Counter | Gauge] = {}
        # The last value of each gauge, by name and labels.
        self._last: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._lock = threading.Lock()
        self._refresher: threading.Thread | None = None

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge, and sets it again regularly: Ray drops gauges that are not set for 20 s."""
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
        """Records the work of a worker in a phase."""
        label = str(rank)
        for kind, seconds in outcome.seconds.items():
            self.add("prox24_work_seconds", seconds, rank=label, kind=kind)
        for name, amount in moved(outcome.counts).items():
            self.add("prox24_moved_bytes", amount, rank=label, kind=name)
        self.add("prox24_tokens", outcome.counts.get("tokens", 0), rank=label)
        self.add("prox24_solved_weights", outcome.counts.get("solved_weights", 0), rank=label)
        for key, kind in (("rss_bytes", "host"), ("device_bytes", "device")):
            if key in outcome.memory:
                self.set("prox24_peak_memory_bytes", outcome.memory[key], rank=label, kind=kind)

    def _metric(self, name: str) -> Counter | Gauge:
        if name not in self._made:
            described = METRICS[name]
            make: Any = Counter if described.kind == "counter" else Gauge
            labels = ("run", *described.labels)
            self._made[name] = make(name, description=described.help, tag_keys=labels)
        return self._made[name]


def moved(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts of bytes that were moved, by kind, such as `statistics_sent`."""
    return {
        name.removesuffix(_BYTES): amount
        for name, amount in counts.items()
        if name.endswith(_BYTES) and name != "statistics_bytes"
    }
