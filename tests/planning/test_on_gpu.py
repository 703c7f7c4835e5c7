"""`benchmarks/on_gpu.py`: what it writes, tried on a CPU with small sizes."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def on_gpu(repository: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own."""
    script = repository / "benchmarks" / "on_gpu.py"
    return subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True, timeout=900
    )


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    repository = Path(__file__).resolve().parents[2]
    return runpy.run_path(str(repository / "benchmarks" / "on_gpu.py"))


def test_every_part_is_written_down_also_one_that_fails(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = on_gpu(repository, "--tiny", "--parts=solve,plan", f"--file={file}")
    assert done.returncode == 1, done.stderr
    found = json.loads(file.read_text())
    (solve,) = found["solve"]["solves"]
    assert (found["solve"]["ok"], solve["rows"], solve["columns"]) == (True, 64, 128)
    assert found["plan"]["ok"] is False
    assert "plan: FAILED" in done.stderr
    assert "there is no finished job to compare with" in done.stderr


def test_no_time_left(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = on_gpu(repository, "--tiny", "--minutes=0", f"--file={file}")
    assert done.returncode == 1
    found = json.loads(file.read_text())
    for part in ("doctor", "tests", "job", "plan", "solve"):
        assert "no time was left" in found[part]["log"]


def test_a_part_that_hangs_is_killed(script: dict[str, Any]) -> None:
    ran = script["_run"](["-c", "print(1, flush=True); import time; time.sleep(1000)"], 3.0)
    assert (ran.status, ran.output) == (None, "1\n")
    assert ran.part()["ok"] is False
    assert "killed after 3 s" in ran.log


def test_the_plan_against_what_was_measured(script: dict[str, Any]) -> None:
    planned = {
        "phases": {
            "solve": {"seconds": 6.0, "device_bytes": 5},
            "write output": {"seconds": 1.0, "device_bytes": 0},
        }
    }
    phase = {"seconds": 2.0, "rss_bytes": 1, "device_bytes": 7}
    measured = {"blocks": [{"phases": {"solve": phase}}, {"phases": {"solve": phase}}]}
    found = script["planned_and_measured"](planned, measured)
    assert found["solve"] == {
        "measured_seconds": 4.0, "measured_device_bytes": 7, "planned_seconds": 6.0,
        "planned_device_bytes": 5, "planned_over_measured": 1.5,
    }  # fmt: skip
    assert found["write output"] == {"planned_seconds": 1.0, "planned_device_bytes": 0}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA Something", "H100"),
    ],
)
def test_the_data_sheet_of_the_gpu(script: dict[str, Any], name: str, kind: str) -> None:
    value = {"devices": [{"name": name}]}
    nodes = [{"answers": {"torch": {"value": value}}}]
    assert script["gpu_kind"]({"doctor": {"doctor": {"nodes": nodes}}}) == kind
    assert script["gpu_kind"]({}) == "H100"


@pytest.mark.slow
def test_all_of_it_on_a_cpu(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = on_gpu(repository, "--tiny", f"--file={file}")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["job"]["job"]["same_bytes_after_kill"] is True
    assert found["plan"]["phases"]["solve"]["planned_over_measured"] > 0
    assert found["doctor"]["doctor"]["ok"] is True
    assert found["tests"]["counts"]
