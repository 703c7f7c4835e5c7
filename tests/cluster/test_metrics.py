"""The metrics' names, what is recorded, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from actors import metrics
from actors.metrics import METRICS, Meter, exported_name
from cluster.dispatch import metered
from cluster.dispatch.metered import MeteredProgress
from pipeline.messages import Outcome
from pipeline.runtime.progress import Silent
from tests.support.processes import until

# Suffixes of base units, and of what has none.
UNITS = ("_seconds", "_bytes", "_ratio")
NO_UNIT = {
    "prox24_blocks", "prox24_blocks_done", "prox24_block", "prox24_phase", "prox24_epoch",
    "prox24_retries", "prox24_tokens", "prox24_solved_weights",
}  # fmt: skip
# What Ray and Prometheus add to every series.
FOREIGN_LABELS = {"run"}


class Recorder:
    """Stands for Ray's metrics: keeps what is recorded, refuses labels that were not declared."""

    values: dict[tuple[Any, ...], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.labels = name, tag_keys
        assert description.endswith(".")

    def _key(self, tags: dict[str, str]) -> tuple[Any, ...]:
        assert set(tags) == set(self.labels)
        assert all(isinstance(value, str) for value in tags.values())
        return (self.name, *(tags[label] for label in self.labels if label != "run"))


class CounterRecorder(Recorder):
    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # Ray refuses anything else
        self.values[self._key(tags)] = self.values.get(self._key(tags), 0) + value


class GaugeRecorder(Recorder):
    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[self._key(tags)] = value


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[Any, ...], float]:
    values: dict[tuple[Any, ...], float] = {}
    monkeypatch.setattr(Recorder, "values", values, raising=False)
    monkeypatch.setattr(metrics, "Counter", CounterRecorder)
    monkeypatch.setattr(metrics, "Gauge", GaugeRecorder)
    return values


@pytest.mark.parametrize("name", METRICS)
def test_names_follow_the_conventions(name: str) -> None:
    assert re.fullmatch(r"prox24(_[a-z]+)+", name)
    assert not name.endswith(("_total", "_count", "_sum"))  # added by who exports
    assert name.endswith(UNITS) != (name in NO_UNIT)
    assert not {"le", "quantile", "run"} & set(METRICS[name].labels)


def test_what_a_rank_records(recorded: dict[tuple[Any, ...], float]) -> None:
    counts = {
        "tokens": 96, "solved_weights": 12, "statistics_bytes": 5, "statistics_sent_bytes": 40,
        "weights_read_bytes": 0,
    }  # fmt: skip
    outcome = Outcome(None, {"forward": 0.5, "io": 0.0}, {"rss_bytes": 7}, counts=counts)
    meter = Meter("a.run")
    meter.outcome(2, outcome)
    meter.outcome(2, outcome)
    assert recorded == {
        ("prox24_work_seconds", "2", "forward"): 1.0,
        ("prox24_moved_bytes", "2", "statistics_sent"): 80,
        ("prox24_tokens", "2"): 192,
        ("prox24_solved_weights", "2"): 24,
        ("prox24_peak_memory_bytes", "2", "host"): 7,
    }


def test_gauges_are_kept_alive(
    recorded: dict[tuple[Any, ...], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray forgets what is not set again."""
    monkeypatch.setattr(metrics.ray, "is_initialized", lambda: True)
    meter = Meter("a.run", refresh_seconds=0.01)
    meter.set("prox24_block", 7)
    meter.add("prox24_tokens", 3, rank="0")
    recorded.clear()
    until(lambda: bool(recorded), "the gauge")
    assert recorded == {("prox24_block",): 7}  # a counter is not added to again


def test_what_the_driver_records(
    recorded: dict[tuple[Any, ...], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    connected = False
    monkeypatch.setattr(metered.ray, "is_initialized", lambda: connected)
    told: list[str] = []

    class Inner(Silent):
        def phase(self, name: str, block: int | None = None) -> None:
            told.append(name)

    progress = MeteredProgress(Inner(), "a.run")
    progress.phase("read text")  # before there is a cluster
    assert recorded == {}
    connected = True
    progress.begin("pruning", 4, 1)
    progress.phase("calibrate", 1)
    progress.attempt_failed("block 1", 1, 3, "lost")
    progress.phase("solve", 1)
    progress.phase("reconstruct 1/8", 1)
    progress.phase("reconstruct 2/8", 1)
    progress.block_done(1, 12.5, (1.5, 1.25))
    assert told == ["read text", "calibrate", "solve", "reconstruct 1/8", "reconstruct 2/8"]
    assert recorded == {
        ("prox24_blocks",): 4,
        ("prox24_blocks_done",): 2,
        ("prox24_block",): 1,
        ("prox24_phase", "read text"): 0,
        ("prox24_phase", "calibrate"): 0,
        ("prox24_phase", "solve"): 0,
        ("prox24_phase", "reconstruct"): 1,
        ("prox24_epoch",): 2,
        ("prox24_output_error_ratio", "1", "before"): 0.015,
        ("prox24_output_error_ratio", "1", "after"): 0.0125,
        ("prox24_retries",): 1,
        ("prox24_relative_error_ratio", "1"): 0.125,
    }


@pytest.fixture(scope="module")
def dashboard(repository: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((repository / "cluster/launch/grafana.json").read_text())
    return read


def test_the_dashboard_asks_for_metrics_that_there_are(dashboard: dict[str, Any]) -> None:
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    exported = {exported_name(name): METRICS[name] for name in METRICS}
    asked: set[str] = set()
    for query in queries:
        names = set(re.findall(r"\bray_\w+", query))
        assert names <= set(exported), query
        asked |= names
        assert query.count("(") == query.count(")")
        for name, matchers in re.findall(r"(ray_\w+)\{([^}]*)\}", query):
            labels = set(re.findall(r"(\w+)\s*=~?", matchers))
            assert labels <= {*exported[name].labels, *FOREIGN_LABELS}, query
            if name.endswith("_total") and "or 0" not in query:
                assert re.search(rf"rate\({name}\{{[^}}]*\}}\[\$__rate_interval\]\)", query), query
        grouped = {label for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(", ")}
        known = {label for name in names for label in exported[name].labels}
        assert grouped <= known | FOREIGN_LABELS, query
    assert asked == set(exported)  # every metric is shown


def test_the_dashboard_can_be_imported(dashboard: dict[str, Any]) -> None:
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [(x, p["y"]) for p in places for x in range(p["x"], p["x"] + p["w"])]
    assert len(cells) == len(set(cells))
    assert all(p["x"] + p["w"] <= 24 for p in places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    variables = {v["name"] for v in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"])))
    assert used <= variables | {"__rate_interval"}
    for panel in dashboard["panels"]:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["description"]
