"""Work that cannot succeed: killed at every attempt, a bug, a worker over the memory limit.

The command itself runs in this process, so that its messages and its exit code are seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from cluster import command_line
from cluster.dispatch import ray_executor
from tests.support.faults import Fault, Plan, faulty
from tests.support.jobs import contents, write_text
from tests.support.ray_jobs import OPTIONS, ray_cluster, undisturbed
from tests.support.tiny_models import change_weights, largest, save_tiny_model

BLOCKS = 2
# What may be taken on top of what this machine's processes have when the cluster starts.
MEMORY_BYTES = 4 << 30


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster whose memory monitor stops workers once much more is taken than now."""
    memory = psutil.virtual_memory()
    more = min(MEMORY_BYTES, memory.available // 2)
    threshold = (memory.total - memory.available + more) / memory.total
    settings = {"memory_usage_threshold": threshold, "memory_monitor_refresh_ms": 100}
    with ray_cluster(2, **settings) as cluster:
        yield str(cluster.address)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("poison")
    model = save_tiny_model(folder / "model", blocks=BLOCKS)
    text = write_text(folder / "text.txt")
    return model, text, undisturbed(model, text, folder / "whole")


class Bench:
    """One job of the command line."""

    def __init__(
        self, folder: Path, address: str, source: tuple[Path, Path, dict[str, bytes]],
        capture: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        self.model, self.text, self.expected = source
        self.output, self.run_directory = folder / "output", folder / "output.run"
        self.address, self.capture, self.patch = address, capture, patch

    def command(self, *faults: Fault, **options: object) -> tuple[int, str]:
        """Exit code and the line of `prox24: ...`."""
        self.plan = Plan(self.run_directory.with_name("faults"), faults)
        self.patch.setattr(ray_executor, "RankActor", faulty(self.plan))
        options = OPTIONS | {"dataset": self.text, "ray_address": self.address} | options
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        code = command_line.run(["prune", str(self.model), str(self.output), *arguments])
        errors = self.capture.readouterr().err
        assert "Traceback" not in errors
        lines = [line for line in errors.splitlines() if line.startswith("prox24: ")]
        if faults and not self.plan.struck(faults[0]) and "memory monitor" in errors:
            pytest.skip("other processes of this machine took the memory")
        return code, "".join(lines)

    def goes_on(self) -> None:
        """The same command finishes, once whatever was in its way is gone."""
        (self.plan.folder / "plan.json").write_text("[]")
        assert self.command() == (0, "")
        assert contents(self.output) == self.expected


@pytest.fixture
def bench(
    tmp_path: Path, address: str, source: tuple[Path, Path, dict[str, bytes]],
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> Bench:  # fmt: skip
    return Bench(tmp_path, address, source, capfd, monkeypatch)


def test_killed_at_every_attempt(bench: Bench) -> None:
    """The cause, the history, what is kept, and how to go on."""
    fault = Fault("solve", "solver", call=2, block=1, times=9)
    code, line = bench.command(fault, max_attempts=2)
    assert code == 1
    pids = [strike["pid"] for strike in bench.plan.struck(fault)]
    assert len(pids) == 2
    for text in (
        "block 1 failed 2 times",
        *(f"attempt {n}: WorkerLostError: phase solve: worker 1 (process {pid} on "
          for n, pid in enumerate(pids, 1)),
        f"1 of {BLOCKS} blocks are committed in {bench.run_directory}",
        "run the same command again",
    ):  # fmt: skip
        assert text in line


@pytest.mark.slow
def test_what_stood_in_the_way_is_gone(bench: Bench) -> None:
    fault = Fault("solve", "solver", call=2, block=1, times=9)
    assert bench.command(fault, max_attempts=1)[0] == 1
    bench.goes_on()


def test_a_worker_over_the_memory_limit(bench: Bench) -> None:
    """Told apart from a crash, with block, phase and remedy; tried once more, not again."""
    fault = Fault("advance", "accumulate", call=3, block=0, what="memory", times=9)
    code, line = bench.command(fault, max_attempts=5)
    assert code == 2
    assert len(bench.plan.struck(fault)) == 2
    for text in (
        "block 1 failed 2 times",
        "attempt 1: WorkerMemoryError: phase advance: Ray's memory monitor stopped worker 1",
        "attempt 2: WorkerMemoryError: phase advance: ",
        "--batch-size",
        "fewer workers",
        f"1 of {BLOCKS} blocks are committed",
    ):
        assert text in line


@pytest.mark.slow
def test_a_worker_over_the_memory_limit_once(bench: Bench) -> None:
    """The memory may have been another's: the block is done again."""
    fault = Fault("advance", "accumulate", call=3, block=0, what="memory")
    assert bench.command(fault)[0] == 0
    assert len(bench.plan.struck(fault)) == 1
    assert contents(bench.output) == bench.expected


@pytest.mark.slow
@pytest.mark.parametrize("what", ["TypeError", "AssertionError", "MemoryError"])
def test_what_a_worker_raises_is_not_tried_again(bench: Bench, what: str) -> None:
    fault = Fault("solve", "solver", call=2, block=1, what=what, times=9)
    code, line = bench.command(fault)
    assert code == (2 if what == "MemoryError" else 1)
    assert len(bench.plan.struck(fault)) == 1
    assert "block 1" in line
    assert "phase solve" in line
    assert ("out of memory" if what == "MemoryError" else f"unexpected {what}: planted") in line
    records = sorted(bench.run_directory.glob("checkpoints/*/record.json"))
    assert [json.loads(path.read_text())["block"] for path in records] == [0]


@pytest.mark.slow
def test_a_nan_is_not_tried_again(bench: Bench) -> None:
    fault = Fault("advance", "outputs", block=0, what="NaN", times=9)
    code, line = bench.command(fault)
    assert code == 1
    assert len(bench.plan.struck(fault)) == 1
    assert "block 0: its output held NaN or Inf, but not when it was computed again" in line


def test_an_overflow_is_told_as_in_process(bench: Bench, tmp_path: Path) -> None:
    """The module that overflows is found by the worker; its message and exit code arrive as is."""
    big = {f"model.layers.1.mlp.{name}_proj.weight": largest(600) for name in ("gate", "up")}
    bench.model = change_weights(save_tiny_model(tmp_path / "half", dtype=torch.float16), big)
    assert bench.command() == (
        1,
        "prox24: block 1: the input of model.layers.1.mlp.down_proj is not finite in float16 "
        "(which ends at 65504); use --dtype bfloat16 or float32",
    )
