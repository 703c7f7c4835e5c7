"""Jobs by the command line on the fake GPU: killed and resumed, and what they say of the GPU."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.evaluate import EvalConfig
from pipeline.evaluation.perplexity import evaluate
from pipeline.runtime.progress import Silent
from pipeline.worker.local_executor import LocalExecutor
from tests.support.fake_gpu import fake_gpu
from tests.support.fake_gpu.jobs import relative_errors, same_masks
from tests.support.jobs import prune_here
from tests.support.kill_matrix import Matrix, each, fast_folder
from tests.support.processes import Driver

STEADY = {"damping": 0.1, "shrinkage": "0"}
# `--device` is not given: the GPU is found.
OPTIONS = (
    *("--executor=local", "--no-report", "--damping=0.1", "--shrinkage=0"),
    "--reconstruct=none",  # torch goes backward on no fake device
)


@pytest.fixture(scope="module")
def matrix() -> Iterator[Matrix]:
    """Two ranks, two blocks, the default method."""
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        yield Matrix(Path(folder), OPTIONS, within=fake_gpu)


def test_killed_and_resumed_it_has_the_same_bytes(matrix: Matrix) -> None:
    each(matrix, ["before link .*checkpoints/block-000", "amid write .*block-001", "rename out"])
    each(matrix, ["before link .*activations/block-001"], signal.SIGTERM)


def test_it_is_as_good_as_the_job_on_the_cpu(matrix: Matrix, tmp_path: Path) -> None:
    case = matrix.folder / "case-0"
    options = {"nsamples": 4, "seqlen": 16, "batch_size": 2, "workers": 2, **STEADY}
    cpu = prune_here(
        matrix.model, tmp_path / "out", device="cpu", dataset=str(matrix.text), **options
    ).output
    assert relative_errors(case / "out") == pytest.approx(relative_errors(cpu), rel=0.05)
    assert same_masks(case / "out", cpu) > 0.95


def test_it_computed_on_the_gpu(matrix: Matrix) -> None:
    """Without `--device`; its memory is in the summary."""
    path = matrix.folder / "case-0" / "out.run" / "report" / "summary.json"
    summary = json.loads(path.read_text())
    assert summary["memory"]["worker_device_bytes"] > 0


def test_the_command_line_evaluates_on_it(matrix: Matrix, tmp_path: Path) -> None:
    options = {"dataset": str(matrix.text), "seqlen": 64, "threads": 1}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = ["eval", matrix.model, "--executor=local", "--json", *arguments]
    driver = Driver(command, tmp_path / "gpu", within=fake_gpu)
    config = EvalConfig(device="cpu", **options)
    cpu = evaluate(matrix.model, config, lambda: LocalExecutor(1, 1), Silent())
    assert driver.wait() == 0, driver.errors()
    assert json.loads(driver.output())["perplexity"] == pytest.approx(cpu["perplexity"], rel=1e-5)
