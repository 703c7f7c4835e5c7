"""What is counted of a mask, against plain counting, and that row slices add up."""

from __future__ import annotations

import pytest
import torch

from pipeline.mask import mask_counts, merge_mask_counts
from pipeline.solvers.pattern import Pattern


def test_counts_of_two_rows() -> None:
    dense = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    pruned = torch.tensor([[4.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 5.0]])
    assert mask_counts(pruned, dense, Pattern.parse("2:4")) == {
        "weights": 8,
        "kept": 3,
        "magnitude_too": 2,  # of 4, 2 and 5: magnitude keeps 4 and 3, and 3 and 4
        "groups": {"1010": 1, "0001": 1},
    }


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:16", "unstructured:0.5"])
def test_row_slices_add_up_to_the_layer(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = Pattern.parse(pattern)
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(37, 64, generator=generator)
    score = dense.abs() + torch.rand(37, 64, generator=generator)
    pruned = (dense * parsed.keep_mask(score)).bfloat16()
    whole = mask_counts(pruned, dense, parsed)
    monkeypatch.setattr("pipeline.mask._CHUNK_WEIGHTS", 3 * 64)
    slices = [slice(0, 0), slice(0, 5), slice(5, 37)]
    parts = [mask_counts(pruned[rows], dense[rows], parsed) for rows in slices]
    assert merge_mask_counts(parts) == whole | {"groups": dict(sorted(whole["groups"].items()))}
    kept = pruned != 0
    assert whole["kept"] == int(kept.sum())
    assert whole["magnitude_too"] == int((kept & parsed.keep_mask(dense.abs())).sum())
    groups = pruned.numel() // parsed.group if parsed.group in (4, 8) else 0
    assert sum(whole["groups"].values()) == groups
    for positions, count in whole["groups"].items():
        wanted = torch.tensor([digit == "1" for digit in positions])
        assert count == int((kept.reshape(-1, len(positions)) == wanted).all(dim=1).sum())


def test_magnitude_keeps_what_magnitude_keeps() -> None:
    dense = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    pattern = Pattern.parse("2:4")
    pruned = dense * pattern.keep_mask(dense.abs())
    counts = mask_counts(pruned, dense, pattern)
    assert counts["magnitude_too"] == counts["kept"] == 16 * 16
