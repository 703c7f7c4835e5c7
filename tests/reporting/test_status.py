"""`prox24 status`: what it says of jobs that run, were killed, failed, or are done."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster.command_line import run as command
from pipeline.loop.rank import Call
from pipeline.messages import Outcome
from pipeline.records.live_status import recorded
from pipeline.records.status import find_run_directory, read_status
from pipeline.runtime.progress import Silent
from pipeline.worker.local_executor import LocalExecutor
from storage.errors import (
    DataError,
    NumericalError,
    Prox24Error,
    RunDirectoryError,
    RunInterrupted,
    WorkerLostError,
)
from storage.run.directory import RunDirectory
from storage.run.lock import RunLock
from storage.run.status_file import write_status
from tests.support.jobs import contents, prune_here, write_text
from tests.support.processes import Driver, until
from tests.support.tiny_models import save_tiny_model

BLOCKS = 5


def status_of(path: Path) -> dict[str, Any]:
    """The status, and that nothing was changed by asking for it."""
    run = find_run_directory(path)
    before = without_locks(run.path)
    status = read_status(run)
    assert without_locks(run.path) == before
    return status


def without_locks(folder: Path) -> dict[str, bytes]:
    """All files but the locks, into which a living owner writes its heartbeat."""
    return {n: raw for n, raw in contents(folder).items() if not n.startswith("lock-")}


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints, which fits 80 columns."""
    capsys.readouterr()
    assert command(["status", str(path)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    return " ".join(text.split())


def test_a_job_running_dead_and_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "model", blocks=BLOCKS)
    output, run = tmp_path / "output", tmp_path / "output.run"
    arguments = ["prune", model, output, "--dataset", write_text(tmp_path / "text.txt")]
    arguments += ["--executor=local", "--threads=1", "--nsamples=8", "--seqlen=32"]
    driver = Driver(arguments, tmp_path / "log")
    try:
        until(lambda: (run / "checkpoints/block-001/record.json").exists(), "a second block")
        driver.send(signal.SIGSTOP)  # alive, and so that it does not go on meanwhile
        status = status_of(output)
        assert status["state"] == "running", driver.errors()
        assert status["run_directory"] == str(run)
        assert (status["owner"]["pid"], status["owner"]["alive"]) == (driver.pid, True)
        assert status["owner"]["host"] == socket.gethostname()
        assert status["blocks"]["done"] in (2, 3)
        assert status["blocks"]["total"] == BLOCKS
        assert all(block["relative_error"] > 0 for block in status["blocks"]["committed"])
        assert 0 < status["eta_seconds"] <= BLOCKS * status["seconds_per_block"]
        phases = ("propagate", "calibrate", "reduce", "solve", "dense", "reconstruct")
        assert status["phase"]["name"].startswith(phases)
        assert status["disk"]["bytes"] > status["disk"]["checkpoints"] > 0
        assert status["job"]["output"] == str(output)
        assert f"running: process {driver.pid}" in shown(output, capsys)
    finally:
        driver.send(signal.SIGKILL)
        driver.wait()
    dead = status_of(run)
    assert (dead["state"], dead["owner"]["alive"]) == ("dead", False)
    assert dead["blocks"] == status["blocks"]
    assert "run the same command again" in shown(run, capsys)

    # Without the file, or with a damaged one, the records alone tell.
    raw = (run / "status.json").read_bytes()
    for damaged in (raw[:-9], raw.replace(b'"solve"', b'"solved"', 1) + b" x", b"", None):
        (run / "status.json").unlink()
        if damaged is not None:
            (run / "status.json").write_bytes(damaged)
        poorer = status_of(run)
        assert (poorer["state"], poorer["blocks"]) == ("dead", dead["blocks"])
        assert poorer["phase"] is None
        assert [str(run / "status.json") in problem for problem in poorer["problems"]] == (
            [] if damaged is None else [True]
        )
        assert shown(run, capsys)

    again = Driver(arguments, tmp_path / "log")
    assert again.wait() == 0, again.errors()
    done = status_of(output)
    assert (done["state"], done["owner"], done["phase"]) == ("finished", None, None)
    assert done["blocks"]["done"] == done["blocks"]["total"] == BLOCKS
    assert done["blocks"]["committed"][:2] == dead["blocks"]["committed"][:2]
    assert f"{BLOCKS} of {BLOCKS} done" in shown(run, capsys)
    (run / "status.json").unlink()
    assert status_of(run)["state"] == "finished"


class Failing(LocalExecutor):
    """Loses a worker in the first solves, and looks at the status after each."""

    def __init__(self, run: Path, failures: int, error: type[Exception] = WorkerLostError) -> None:
        super().__init__(1, 1)
        self.run_path, self.failures, self.error = run, failures, error
        self.seen: list[dict[str, Any]] = []

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        if calls[0].phase == "solve" and self.failures:
            self.failures -= 1
            raise self.error("worker 0 is gone")
        return super().run(calls)

    def recover(self) -> None:
        super().recover()
        self.seen.append(status_of(self.run_path))


def test_failed_attempts_and_the_error_that_ended_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_model(tmp_path / "model")
    executor = Failing(tmp_path / "output.run", failures=2)
    prune_here(model, tmp_path / "output", executor=executor)
    last = executor.seen[-1]
    assert last["state"] == "running"
    assert [(f["what"], f["attempt"]) for f in last["attempts"]] == [("block 0", 1), ("block 0", 2)]
    assert "worker 0 is gone" in last["attempts"][0]["reason"]

    poisoned = Failing(tmp_path / "other.run", failures=99, error=NumericalError)
    with pytest.raises(NumericalError):
        prune_here(model, tmp_path / "other", executor=poisoned)
    status = status_of(tmp_path / "other")
    assert (status["state"], status["error"]) == ("failed", "worker 0 is gone")
    assert (status["phase"]["name"], status["phase"]["block"]) == ("solve", 0)
    assert "failed: the job ended with an error" in shown(tmp_path / "other", capsys)


@pytest.mark.parametrize("error", [RunInterrupted("SIGTERM"), DataError("a\nb")])
def test_how_a_run_ends(tmp_path: Path, error: Prox24Error) -> None:
    run = RunDirectory(tmp_path)
    with RunLock(tmp_path) as lock:
        run.manifest.write_text("{}")
        with (
            pytest.raises(type(error)),
            recorded(Silent(), run, lock, "model", tmp_path) as progress,
        ):
            progress.begin("pruning", 7, 0)
            raise error
    status = status_of(tmp_path)
    assert status["state"] == ("interrupted" if isinstance(error, RunInterrupted) else "failed")
    assert status["error"] == str(error).replace("\n", " ")
    assert status["blocks"] == {"done": 0, "total": 7, "committed": []}


def test_a_run_that_fails_before_the_directory_is_its_own_leaves_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with (
        RunLock(tmp_path) as lock,
        pytest.raises(DataError),
        recorded(Silent(), run, lock, "model", tmp_path) as progress,
    ):
        progress.phase("read text")
        assert (tmp_path / "status.json").exists()
        raise DataError("no text")
    assert list(tmp_path.iterdir()) == []


def test_a_displaced_owner_changes_nothing(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with RunLock(tmp_path) as lock, recorded(Silent(), run, lock, "m", tmp_path) as progress:
        run.manifest.write_text("{}")
        progress.phase("embed")
        lock.path.rename(tmp_path / "taken-over")
        before = contents(tmp_path)
        progress.phase("solve", 3)
        assert contents(tmp_path) == before
    assert contents(tmp_path) == before


def test_a_signal_during_a_write_is_not_swallowed(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise RunInterrupted("SIGTERM")

    with pytest.raises(RunInterrupted):
        write_status(tmp_path, {}, guard=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_an_owner_on_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        lock = RunLock(tmp_path)
        lock.__enter__()
        path = lock.path
    try:
        status = status_of(tmp_path)
        assert (status["state"], status["owner"]["host"]) == ("running", "elsewhere")
        assert status["owner"]["alive"] is None
        monkeypatch.setattr("pipeline.records.status.STALE_SECONDS", 0.0)
        assert status_of(tmp_path)["state"] == "silent"
        assert "on elsewhere" in shown(tmp_path, capsys)
        path.write_bytes(b"\xff" * 100)
        assert any("lock" in problem for problem in status_of(tmp_path)["problems"])
    finally:
        lock.__exit__(None, None, None)


@pytest.mark.parametrize("name", ["absent", "empty", "file", "a\0b", "x" * 300])
def test_what_is_no_run_directory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    with pytest.raises(RunDirectoryError):
        find_run_directory(tmp_path / name)
    assert command(["status", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(("prox24: neither ", "prox24 status: argument RUN_DIR"))


def test_a_damaged_manifest_and_records_are_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for path in (run.manifest, run.record(0), run.record(3), run.report() / "summary.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[" * 100_000)
    status = status_of(tmp_path)
    assert status["blocks"]["done"] == 2
    assert (status["state"], len(status["problems"])) == ("stopped", 4)


def test_it_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        code = (
            "import sys, cluster.__main__ as m\n"
            "try: m.main()\n"
            "except SystemExit as e: assert not e.code\n"
            "print([n for n in ('torch', 'ray', 'transformers', 'numpy') if n in sys.modules])"
        )
        ran = subprocess.run(
            [sys.executable, "-c", code, "status", str(tmp_path), "--json"],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent.parent,
        )  # fmt: skip
    printed, modules = ran.stdout.splitlines()
    assert json.loads(printed)["state"] == "running"
    assert modules == "[]"
