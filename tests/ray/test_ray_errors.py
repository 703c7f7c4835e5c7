"""What Ray reports of a failure, as it reads to people."""

from __future__ import annotations

import pytest
import torch
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    OutOfMemoryError,
    RaySystemError,
    RayTaskError,
)

from cluster.dispatch.failures import is_of_the_worker, translate
from pipeline.runtime.device_errors import explained, is_out_of_memory
from storage.errors import (
    NumericalError,
    Prox24Error,
    ResourceError,
    WorkerLostError,
    WorkerMemoryError,
)


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("perform", "Traceback ...\nValueError: bad", cause)


def test_what_a_worker_raised_comes_out_as_it_is() -> None:
    for cause in (TypeError("a bug"), NumericalError("block 3: NaN"), WorkerLostError("a peer")):
        error = task_error(cause)
        assert translate(error, "solve", "worker 1") is cause
        assert is_of_the_worker(error)
        assert is_of_the_worker(error.as_instanceof_cause())


def test_a_cause_that_is_another_error_of_ray() -> None:
    told = translate(task_error(RaySystemError("broken")), "solve", "worker 1")
    assert type(told) is Prox24Error
    assert "phase solve: worker 1 failed: ValueError: bad" in str(told)


@pytest.mark.parametrize(
    ("error", "texts"),
    [
        (ActorDiedError(), ["worker 1 is gone"]),
        (ActorUnschedulableError("no node\nhas it"), ["ActorUnschedulableError", "no node has it"]),
        (RaySystemError("the store is full"), ["RaySystemError", "the store is full"]),
    ],
)
def test_whatever_else_ray_says_carries_its_cause(error: Exception, texts: list[str]) -> None:
    told = translate(error, "solve", "worker 1")
    assert isinstance(told, WorkerLostError)
    for text in ("phase solve", "worker 1", *texts):
        assert text in str(told)
    assert "\n" not in str(told)
    assert not is_of_the_worker(error)


def test_a_node_without_the_dependencies_is_named_and_not_tried_again() -> None:
    creation = RayTaskError(
        "RankActor.__init__",
        "ray::RankActor.__init__() (pid=7, ip=10.0.0.2, actor_id=1)\n"
        "RuntimeError: The actor with name RankActor failed to import on the worker. This may be "
        "because needed library dependencies are not installed in the worker environment:\n\n"
        "Traceback (most recent call last):\n"
        "ModuleNotFoundError: No module named 'safetensors'",
        RuntimeError("import"),
    )
    told = translate(ActorDiedError(creation), "start", "worker 1")
    assert isinstance(told, ResourceError)
    for text in ("node 10.0.0.2", "No module named 'safetensors'", "install its dependencies"):
        assert text in str(told)


@pytest.mark.parametrize(("phase", "remedy"), [("advance", "--batch-size"), ("solve", "--workers")])
def test_out_of_memory_says_what_to_lower(phase: str, remedy: str) -> None:
    told = translate(OutOfMemoryError("was 3.7GB used / 4.0GB limit (0.9)"), phase, "worker 1")
    assert isinstance(told, WorkerMemoryError)
    for text in (f"phase {phase}", "worker 1", "3.7GB used / 4.0GB", remedy):
        assert text in str(told)


def test_a_failed_allocation_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    told = str(explained(caught.value, "calibrate", 7))
    for text in ("block 7", "phase calibrate", "out of memory", "--batch-size"):
        assert text in told
