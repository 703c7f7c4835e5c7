"""A job that goes on with another number of workers: 2, then 3, then 1.

Statistics do not depend on who summed what, nor a row's solution on the slice that it lies in: the
same bytes, as long as all workers compute alike. The records tell who did what.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.loop.rank import Call
from pipeline.messages import Outcome
from pipeline.worker.local_executor import LocalExecutor
from storage.errors import RunInterrupted
from tests.models.test_real_model import first_blocks
from tests.support.jobs import check_output, contents, prune_here, write_text
from tests.support.tiny_models import save_tiny_model

BLOCKS = 6
# Enough tokens for a Hessian of full rank: with fewer, a tie is broken by the last bit.
OPTIONS: dict[str, Any] = {"nsamples": 24, "seqlen": 64, "batch_size": 2}


class StopsAt(LocalExecutor):
    """Ends the job as Ctrl-C does, when the solve of a block begins."""

    def __init__(self, world: int, block: int) -> None:
        super().__init__(world, 1)
        self.block = block

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        if calls[0].phase == "solve" and calls[0].block == self.block:
            raise RunInterrupted("test")
        return super().run(calls)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("shape")
    model = save_tiny_model(folder / "model", blocks=BLOCKS, hidden=64, intermediate=128)
    return model, write_text(folder / "text.txt", characters=16384)


@pytest.mark.parametrize(
    "method",
    ["prox_admm", "wanda", "sparsegpt"],
)
def test_two_workers_then_three_then_one(
    source: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    model, text = source
    options = OPTIONS | {"dataset": str(text), "method": method}
    (tmp_path / "whole").mkdir()
    whole = prune_here(model, tmp_path / "whole" / "output", workers=2, **options).output
    output, run = tmp_path / "output", tmp_path / "output.run"
    for world, block in ((2, 2), (3, 4)):
        with pytest.raises(RunInterrupted):
            prune_here(model, output, executor=StopsAt(world, block), **options)
    records = {
        path.parent.name: json.loads(path.read_text())
        for path in run.glob("checkpoints/*/record.json")
    }
    assert [records[f"block-{n:03d}"]["world"] for n in range(4)] == [2, 2, 3, 3]
    result = prune_here(model, output, workers=1, **options)
    done = result.summary["blocks"]
    assert [block["world"] for block in done] == [2, 2, 3, 3, 1, 1]
    assert [len(block["workers"]) for block in done] == [2, 2, 3, 3, 1, 1]
    assert all(worker["host"] and worker["pid"] for b in done for worker in b["workers"])
    check_output(model, output)
    assert contents(output) == contents(whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_model(smollm2: Path, tmp_path: Path, repository: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(p.read_text() for p in sorted(repository.rglob("pipeline/*.py"))))
    model = first_blocks(smollm2, tmp_path / "model", 3)
    options = {"nsamples": 16, "seqlen": 256, "batch_size": 2, "dataset": str(text)}
    (tmp_path / "whole").mkdir()
    whole = prune_here(model, tmp_path / "whole" / "output", workers=2, **options).output
    output = tmp_path / "output"
    for world, block in ((2, 1), (3, 2)):
        with pytest.raises(RunInterrupted):
            prune_here(model, output, executor=StopsAt(world, block), **options)
    prune_here(model, output, workers=1, **options)
    assert contents(output) == contents(whole)
