"""`--trace` says what the driver and each rank did when, and is readable while it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.loop.trace import TracingExecutor
from pipeline.worker.local_executor import LocalExecutor
from storage.errors import FileError
from tests.support.jobs import contents, prune_here

TinyModel = Callable[..., Path]


def spans(path: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text()) if event.get("ph") == "X"]


def test_a_trace_holds_every_phase_of_every_rank(tiny_model: TinyModel, tmp_path: Path) -> None:
    model, trace = tiny_model("llama", blocks=2), tmp_path / "trace.json"
    plain = prune_here(model, tmp_path / "plain", workers=2)
    traced = prune_here(model, tmp_path / "traced", workers=2, trace=str(trace))
    expected, found = contents(plain.output), contents(traced.output)
    names = [name for name in expected if name.endswith(".safetensors")]
    assert names
    assert all(found[name] == expected[name] for name in names)

    events = json.loads(trace.read_text())
    labels = {e["pid"]: e["args"]["name"] for e in events if e.get("ph") == "M"}
    assert labels == {0: "driver", 1: "rank 0", 2: "rank 1"}
    phases = ["calibrate", "reduce", "solve", "advance", "reduce", "solve"]
    for process in (0, 1, 2):
        own = sorted((e for e in spans(trace) if e["pid"] == process), key=lambda e: e["ts"])
        in_order = [e["name"] for e in own if e["name"] in phases]
        # A rank's "reduce" holds a stretch of that name.
        assert [n for n, before in zip(in_order, ["", *in_order], strict=False) if n != before] == (
            phases
        )
    for event in spans(trace):
        assert event["dur"] >= 0
        inside = [
            e
            for e in spans(trace)
            if e["pid"] == 0 and e["ts"] - 2e3 <= event["ts"] and _end(event) <= _end(e) + 2e3
        ]
        assert inside, "what a rank does lies within what the driver waits for"
    solves = [e for e in spans(trace) if e["pid"] == 0 and e["name"] == "solve"]
    assert [e["args"]["block"] for e in solves] == [0, 1]


def test_a_trace_that_broke_off_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    executor = TracingExecutor(LocalExecutor(1, 1), path)
    executor.recover()
    text = path.read_text()
    assert text.startswith("[\n")
    events = [json.loads(line.rstrip(",")) for line in text.splitlines()[1:]]
    assert [event["name"] for event in events] == ["process_name", "recover"]
    executor.close()
    assert json.loads(path.read_text())[1]["name"] == "recover"


def test_a_trace_that_cannot_be_written_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="--trace .*Is a directory; move"):
        prune_here(tiny_model(), tmp_path / "output", trace=str(tmp_path))


def _end(event: dict[str, Any]) -> float:
    return float(event["ts"]) + float(event["dur"])
