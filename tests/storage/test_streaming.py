"""A calibration set whose activations are several times the memory that a job may take."""

from __future__ import annotations

import resource
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.messages import Job
from pipeline.worker.local_executor import LocalExecutor
from tests.support.jobs import prune_here, write_text
from tests.support.processes import CONTEXT, PATIENCE
from tests.support.tiny_models import save_tiny_model

MIB = 1 << 20
# fp32 hidden states of 256 values: 1 KiB a token.
NSAMPLES, SEQLEN, HIDDEN = 400, 512, 256
STORE = NSAMPLES * SEQLEN * HIDDEN * 4
ALLOWED = STORE // 4


class Limited(LocalExecutor):
    """Lets its process take so much memory beyond what it has taken at the start, and no more."""

    def start(self, job: Job) -> None:
        super().start(job)
        # Private writable memory: what is allocated, and maps of activation shards.
        most = _status("VmData") + ALLOWED
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        with pytest.raises(RuntimeError, match="memory"):
            torch.zeros(STORE // 4)


def limited_job(folder: str, answers: Any) -> None:
    """Runs the job where as much memory as its activations take is not to be had."""
    try:
        here = Path(folder)
        model = save_tiny_model(here / "model", hidden=HIDDEN, positions=SEQLEN)
        text = write_text(here / "text.txt", characters=2 * NSAMPLES * SEQLEN)
        prune_here(
            model,
            here / "output",
            executor=Limited(1, 1),
            method="wanda",
            dataset=str(text),
            nsamples=NSAMPLES,
            seqlen=SEQLEN,
            batch_size=1,
        )
        answers.put("done")
    except BaseException:
        answers.put(traceback.format_exc())


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def test_activations_larger_than_memory_go_through(tmp_path: Path) -> None:
    answers = CONTEXT.Queue()
    process = CONTEXT.Process(target=limited_job, args=(str(tmp_path), answers))
    process.start()
    answer = answers.get(timeout=PATIENCE)
    process.join()
    assert answer == "done"
    assert (tmp_path / "output" / "prox24.json").exists()
    assert STORE > 150 * MIB
