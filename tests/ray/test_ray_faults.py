"""Workers killed and frozen for real in every phase: the job goes on by itself, to the same bytes.

One cluster and one model serve all tests; each fault strikes in the middle of its phase.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.counted import ON_RESPONSES, cut_turns
from tests.support.faults import Fault
from tests.support.jobs import contents, write_text
from tests.support.ray_jobs import OPTIONS, RayJob, ray_cluster, undisturbed, wait_until_gone
from tests.support.tiny_models import save_tiny_model

BLOCKS = 5
# Regularization chosen at run time, and the output evaluated: every phase that there is.
EVERY_PHASE: dict[str, Any] = {"shrinkage": "auto", "eval_nsamples": 8}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ray_cluster(3) as cluster:
        yield str(cluster.address)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    """A model, a text, and the bytes of the job with every phase that nothing disturbs."""
    folder = tmp_path_factory.mktemp("faults")
    model = save_tiny_model(folder / "model", "qwen2", blocks=BLOCKS, weight_files=3)
    text = write_text(folder / "text.txt")
    return model, text, undisturbed(model, text, folder / "whole", eval_dataset=str(text),
                                    **EVERY_PHASE)  # fmt: skip


def job(
    folder: Path, source: tuple[Path, Path, dict[str, bytes]], address: str,
    faults: list[Fault], **options: Any,
) -> RayJob:  # fmt: skip
    model, text, _ = source
    options = EVERY_PHASE | {"eval_dataset": str(text)} | options
    return RayJob(folder, model, text, address, faults, **options)


def check(done: RayJob, source: tuple[Path, Path, dict[str, bytes]], fault: Fault) -> None:
    """The fault struck once, and no trace of it is in the output."""
    assert len(done.plan.struck(fault)) == 1
    # A busy machine may take a slow phase for one that hangs, where the limit is short.
    assert len(done.retries()) == 1 or fault.what == "SIGSTOP"
    found, expected = contents(done.output), source[2]
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_workers_lost_in_phase_after_phase(
    source: tuple[Path, Path, dict[str, bytes]], address: str, tmp_path: Path
) -> None:
    """One job, a fault in each block, one of them a worker that hangs. The records tell."""
    hang = Fault("advance", "accumulate", call=3, block=3, what="SIGSTOP")
    faults = [
        Fault("start", "build"),
        Fault("reduce", "sum", call=2, block=0, rank=0),
        Fault("solve", "write", call=3, block=1),
        Fault("advance", "write", call=4, block=2),
        hang,
    ]
    model, text, _ = source
    broken = RayJob(tmp_path, model, text, address, faults, phase_timeout=10.0, max_attempts=9)
    result = broken.run()
    assert contents(broken.output) == undisturbed(model, text, tmp_path / "whole")
    for fault in faults:
        assert len(broken.plan.struck(fault)) == 1, fault
    blocks = result.summary["blocks"]
    pid = broken.plan.struck(faults[2])[0]["pid"]
    assert f"phase solve: worker 1 (process {pid} on " in blocks[1]["failures"][0]
    for block in blocks:
        assert len({worker["pid"] for worker in block["workers"]}) == OPTIONS["workers"]
    # The others are not started anew: what is lost is what is replaced.
    assert blocks[1]["workers"][0] == blocks[0]["workers"][0]
    assert blocks[1]["workers"][1] != blocks[0]["workers"][1]
    stopped = broken.plan.struck(hang)[0]["pid"]
    (told,) = [note for note in broken.retries() if f"process {stopped} on" in note]
    assert "--phase-timeout" in told
    assert wait_until_gone(stopped)


@pytest.mark.slow
def test_workers_count_the_tokens_that_count_though_one_is_lost(
    source: tuple[Path, Path, dict[str, bytes]], address: str, tmp_path: Path
) -> None:
    model, text, _ = source
    options = ON_RESPONSES | {"shrinkage": "auto"}
    fault = Fault("advance", "accumulate", call=3, block=1)
    done = RayJob(tmp_path, model, text, address, [fault], cut=cut_turns, **options)
    done.run()
    assert len(done.plan.struck(fault)) == 1
    whole = undisturbed(model, text, tmp_path / "whole", cut=cut_turns, **options)
    assert contents(done.output) == whole
    assert whole != undisturbed(model, text, tmp_path / "all", shrinkage="auto")


MATRIX = [
    *(Fault("start", "build", rank=rank) for rank in (0, 1)),
    *(Fault("join", "join", rank=rank) for rank in (0, 1)),
    Fault("fingerprint", "hash"),
    Fault("embed", "write", rank=0),
    Fault("embed", "write", call=5),
    Fault("calibrate", "load", block=0),
    Fault("calibrate", "accumulate", call=5, block=0, rank=0),
    Fault("reduce", "sum", block=0),
    Fault("reduce", "sum", call=4, block=3, rank=0),
    Fault("choose", "choice", block=0, rank=0),
    Fault("choose", "choice", block=4),
    Fault("solve", "solver", block=0),
    Fault("solve", "solver", call=2, block=2, rank=0),
    Fault("solve", "write", block=1),
    Fault("solve", "write", call=2, block=4, rank=0),
    Fault("advance", "load", block=1),
    Fault("advance", "accumulate", call=8, block=2, rank=0),
    Fault("advance", "write", call=2, block=0, rank=0),
    Fault("advance", "write", call=5, block=3),
    Fault("propagate", "load", block=1),
    Fault("propagate", "write", call=2, block=4, rank=0),
    Fault("write_output", "write"),
    Fault("write_output", "write", call=3, rank=0),
    Fault("losses", "loss", call=2),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", MATRIX, ids=lambda fault: fault.name)
@pytest.mark.parametrize("what", ["SIGKILL", "SIGSTOP"])
def test_every_phase(
    source: tuple[Path, Path, dict[str, bytes]], address: str, tmp_path: Path,
    fault: Fault, what: str,
) -> None:  # fmt: skip
    fault = dataclasses.replace(fault, what=what)
    limits = {"phase_timeout": 10.0, "max_attempts": 9} if what == "SIGSTOP" else {}
    broken = job(tmp_path, source, address, [fault], **limits)
    broken.run(start_seconds=30.0 if what == "SIGSTOP" else 300.0)
    print(f"\n{what} in {fault.name}: work goes on after {broken.seconds_lost(fault):.1f} s")
    check(broken, source, fault)
    assert wait_until_gone(broken.plan.struck(fault)[0]["pid"])
