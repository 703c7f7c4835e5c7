"""Ranks that are threads of one process: what they hand each other, and the failure of one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pipeline.worker.training.in_process import InProcess, Meeting
from storage.errors import WorkerLostError


def test_all_ranks_get_the_sum_in_rank_order() -> None:
    meeting, big = Meeting(3), torch.tensor(2.0**24)
    given = [big, torch.tensor(1.0), -big]  # in any other order the sum is 1
    with ThreadPoolExecutor(3) as pool:
        sums = pool.map(lambda rank: InProcess(meeting, rank).sum(given[rank].clone()), range(3))
        assert [float(each) for each in sums] == [0.0] * 3


def test_the_failure_of_one_ends_the_wait_of_the_others() -> None:
    meeting = Meeting(3)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(meeting.all_of, rank, []) for rank in range(2)]
        meeting.abandon()
        for each in waiting:
            with pytest.raises(WorkerLostError, match="another rank of this process has failed"):
                each.result(60)
