"""Only a lost worker is worth another attempt, and only so many times."""

from __future__ import annotations

import pytest

from pipeline.loop.retry import AttemptHistory
from storage.errors import (
    CorruptFileError,
    ModelError,
    NumericalError,
    WorkerLostError,
    WorkerMemoryError,
)


@pytest.mark.parametrize("attempts", [1, 2, 5])
def test_a_lost_worker_is_retried_so_many_times(attempts: int) -> None:
    history = AttemptHistory(attempts)
    decisions = [history.should_retry(WorkerLostError("gone")) for _ in range(attempts)]
    assert decisions == [True] * (attempts - 1) + [False]


@pytest.mark.parametrize(
    "error",
    [NumericalError("NaN"), ModelError("bad"), CorruptFileError("cut"), RuntimeError("a bug")],
)
def test_nothing_else_is_retried(error: Exception) -> None:
    assert not AttemptHistory(3).should_retry(error)


def test_a_worker_out_of_memory_is_retried_once() -> None:
    """The memory may have been another's; the second time it is not taken for that."""
    history = AttemptHistory(5)
    assert history.should_retry(WorkerMemoryError("full"))
    assert history.should_retry(WorkerLostError("gone"))
    assert not history.should_retry(WorkerMemoryError("full"))
    assert not AttemptHistory(1).should_retry(WorkerMemoryError("full"))


def test_a_summary_names_every_failure() -> None:
    history = AttemptHistory(3)
    history.should_retry(WorkerLostError("rank 1 is gone"))
    history.should_retry(NumericalError("block 4: NaN"))
    assert history.summary() == (
        "attempt 1: WorkerLostError: rank 1 is gone; attempt 2: NumericalError: block 4: NaN"
    )
