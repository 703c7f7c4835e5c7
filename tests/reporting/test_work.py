"""What a job says of who did what, and of the bytes that were moved for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.console import ranges, who_did_what
from pipeline.records.times import Work, by_worker
from tests.support.jobs import is_linear_of_a_block, prune_here, tensors

TinyModel = Callable[..., Path]


def test_a_job_says_who_did_what(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama", blocks=3)
    summary = prune_here(model, tmp_path / "output", workers=2).summary
    assert [(w["rank"], w["blocks"]) for w in summary["workers"]] == [
        (0, [0, 1, 2]),
        (1, [0, 1, 2]),
    ]
    linears = [tensor for name, tensor in tensors(model) if is_linear_of_a_block(name)]
    weights = sum(tensor.numel() for tensor in linears)
    counts = [worker["counts"] for worker in summary["workers"]]
    assert (
        sum(own["solved_weights"] for own in counts)
        == weights
        == summary["counts"]["solved_weights"]
    )
    # Each row slice is written once; what is more is the files' headers.
    size = sum(tensor.nbytes for tensor in linears)
    assert 0 <= summary["counts"]["slices_written_bytes"] - size < 8192 * 6
    # Every block is run dense once, and all but the last once more, pruned.
    assert summary["counts"]["tokens"] == 8 * 32 * (3 + 2)
    for worker in summary["workers"]:
        assert worker["peak_bytes"] > 0
        assert worker["seconds"]["solve"] > 0
    lines = who_did_what(summary)
    assert len(lines) == 2
    label, told = lines[1]
    assert label == "worker 1"
    assert told.startswith("on ")
    assert "blocks 0-2;" in told
    assert "solve" in told


def test_workers_that_were_replaced_are_told_apart() -> None:
    def phase(*seconds: float) -> dict[str, dict[str, object]]:
        ranks = [{"solve": s} for s in seconds]
        counts = [{"statistics_sent_bytes": 7, "weights_read_bytes": 5}] * len(seconds)
        return {
            "solve": {
                "wall": 1.0, "ranks": ranks, "memory": [{"rss_bytes": 9}] * len(seconds),
                "counts": counts,
            }
        }  # fmt: skip

    first, second = {"host": "a", "pid": 1, "node": "x"}, {"host": "b", "pid": 2, "node": "y"}
    other = {"host": "b", "pid": 3, "node": "y"}
    work = [
        Work(0, [first, second], phase(1.0, 2.0)),
        Work(1, [first, other], phase(4.0, 8.0)),
        Work(2, [first], phase(16.0)),  # on one worker, after a node was lost
    ]
    found = [(w["rank"], w["pid"], w["blocks"], w["seconds"]["solve"]) for w in by_worker(work)]
    assert found == [(0, 1, [0, 1, 2], 21.0), (1, 2, [0], 2.0), (1, 3, [1], 8.0)]
    assert by_worker(work)[0]["counts"] == {"statistics_sent_bytes": 21, "weights_read_bytes": 15}


@pytest.mark.parametrize(
    ("blocks", "text"),
    [([3], "block 3"), ([0, 1], "blocks 0-1"), ([0, 1, 2, 5, 7, 8], "blocks 0-2, 5, 7-8")],
)
def test_blocks_in_words(blocks: list[int], text: str) -> None:
    assert ranges(blocks) == text
