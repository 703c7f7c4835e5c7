"""What is counted of a mask, against plain counting, and that row slices add up."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.pattern import Pattern
from pipeline.solvers.mask_counts import column_pattern, mask_counts, merge_mask_counts
from pipeline.solvers.masks import keep_mask


def test_counts_of_two_rows() -> None:
    dense = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    pruned = torch.tensor([[4.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 5.0]])
    assert merge_mask_counts([mask_counts(pruned, dense, Pattern.parse("2:4"))]) == {
        "weights": 8,
        "kept": 3,
        "magnitude_too": 2,  # of 4, 2 and 5: magnitude keeps 4 and 3, and 3 and 4
        "groups": {"1010": 1, "0001": 1},
        # Kept by 1, 0, 1 and 1 of the two rows, 0.75 in the mean.
        "columns": {"count": 4, "never": 1, "rarely": 1, "often": 0, "norm_correlation": None},
    }


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:16", "unstructured:0.5"])
def test_row_slices_add_up_to_the_layer(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = Pattern.parse(pattern)
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(37, 64, generator=generator)
    score = dense.abs() + torch.rand(37, 64, generator=generator)
    pruned = (dense * keep_mask(parsed, score)).bfloat16()
    moments = torch.rand(64, generator=generator)
    whole = merge_mask_counts([mask_counts(pruned, dense, parsed, moments)])
    monkeypatch.setattr("pipeline.solvers.mask_counts._CHUNK_WEIGHTS", 3 * 64)
    slices = [slice(0, 0), slice(0, 5), slice(5, 37)]
    parts = [mask_counts(pruned[rows], dense[rows], parsed, moments) for rows in slices]
    merged = merge_mask_counts(parts)
    correlations = [each["columns"].pop("norm_correlation") for each in (merged, whole)]
    assert merged == whole
    often = (pruned != 0).double().sum(dim=0)
    expected = torch.corrcoef(torch.stack((often, moments.double().log())))[0, 1]
    assert correlations == pytest.approx([float(expected)] * 2, abs=1e-12)
    kept = pruned != 0
    assert whole["kept"] == int(kept.sum())
    assert whole["magnitude_too"] == int((kept & keep_mask(parsed, dense.abs())).sum())
    groups = pruned.numel() // parsed.group if parsed.group in (4, 8) else 0
    assert sum(whole["groups"].values()) == groups
    for positions, count in whole["groups"].items():
        wanted = torch.tensor([digit == "1" for digit in positions])
        assert count == int((kept.reshape(-1, len(positions)) == wanted).all(dim=1).sum())


def test_magnitude_keeps_what_magnitude_keeps() -> None:
    dense = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    pattern = Pattern.parse("2:4")
    pruned = dense * keep_mask(pattern, dense.abs())
    counts = mask_counts(pruned, dense, pattern)
    assert counts["magnitude_too"] == counts["kept"] == 16 * 16


def test_inputs_that_a_mask_prefers() -> None:
    """Of 40 rows, at 2:4: less than 10 are rare, more than 30 are often."""
    by_column = torch.tensor([40, 31, 30, 20, 20, 10, 9, 0])
    found = column_pattern(by_column, 40, None)
    assert found == {"count": 8, "never": 1, "rarely": 2, "often": 2, "norm_correlation": None}
    assert column_pattern(torch.zeros(4, dtype=torch.int64), 0, None)["never"] == 0


def test_a_mask_that_follows_the_norms_of_its_inputs() -> None:
    pattern = Pattern.parse("2:4")
    moments = torch.tensor([1.0, 1.0, 1e4, 1e4] * 8)
    dense = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))

    def correlation(scores: torch.Tensor, moments: torch.Tensor | None) -> float | None:
        pruned = dense * keep_mask(pattern, scores)
        counts = merge_mask_counts([mask_counts(pruned, dense, pattern, moments)])
        value: float | None = counts["columns"]["norm_correlation"]
        return value

    by_wanda = correlation(dense.abs() * moments.sqrt(), moments)
    assert by_wanda is not None
    assert by_wanda > 0.99
    by_magnitude = correlation(dense.abs(), moments)
    assert by_magnitude is not None
    assert abs(by_magnitude) < 0.5
    for other in (None, torch.zeros(32), torch.ones(32)):
        unknown = correlation(dense.abs(), other)
        assert not unknown, other
    # An input that is always 0 is the smallest, and no infinity.
    dead = torch.tensor([0.0, 1.0, 1e4, 1e4] * 8)
    found = correlation(dense.abs() * dead.sqrt(), dead)
    assert found is not None
    assert 0.9 < found <= 1
