"""A driver killed amid the experts of a mixture, and the same bytes in the end.

The experts of a block are taken in turns, each of which chooses, solves and writes row slices, and
only after the last of them the block is committed. Real signals, as in `test_kill_matrix`.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.kill_matrix import Matrix, each, fast_folder
from tests.support.moe_models import save_moe

# Statistics of three groups of layers at a time.
OPTIONS = (
    "--executor=local", "--no-report", "--hessian-memory=5e-5", "--shrinkage=auto",
    "--expert-tokens=4",
)  # fmt: skip
BLOCKS = ("block-000", "block-001")


@pytest.fixture(scope="module")
def matrix() -> Iterator[Matrix]:
    save = partial(save_moe, family="olmoe", weight_files=2)
    with tempfile.TemporaryDirectory(dir=fast_folder()) as folder:
        yield Matrix(Path(folder), OPTIONS, save=save)


def slices(matrix: Matrix, block: str, rank: int) -> list[str]:
    """Patterns of the files of row slices that a rank writes of a block: one for each turn."""
    pattern = rf"before open .*{block}/rank-{rank}\.\w+(-\d+)\.safetensors"
    found = [match[1] for match in map(re.compile(pattern).match, matrix.points) if match]
    return [rf"{block}/rank-{rank}\.\w+{stamp}\.safetensors" for stamp in dict.fromkeys(found)]


def test_the_experts_are_taken_in_turns(matrix: Matrix) -> None:
    """Else the other tests would prove little. Choices are committed before each turn's solve."""
    for block in BLOCKS:
        assert min(len(slices(matrix, block, rank)) for rank in range(2)) >= 3
        chosen = [
            name for name in matrix.points if re.match(f"after replace .*choices/{block}", name)
        ]
        assert len(chosen) >= 3


def test_killed_within_a_turn_and_at_the_commit(matrix: Matrix) -> None:
    each(
        matrix,
        (
            f"amid write .*{slices(matrix, BLOCKS[0], 1)[1]}",
            f"before link .*checkpoints/{BLOCKS[1]}/record.json",
        ),
    )


@pytest.mark.slow
def test_killed_around_the_row_slices_of_every_turn(matrix: Matrix) -> None:
    for rank in range(2):
        files = slices(matrix, BLOCKS[0], rank)
        each(matrix, [f"before open .*{file}" for file in files])
        each(matrix, [f"after fsync .*{file}" for file in files])


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_killed_around_what_a_block_commits(matrix: Matrix, block: str) -> None:
    committed = (f"checkpoints/{block}/record.json", f"activations/{block}/record.json")
    points = [f"{when} link .*{name}" for name in committed for when in ("before", "after")]
    points += [f"{when} replace .*choices/{block}" for when in ("before", "after")]
    each(matrix, points)
