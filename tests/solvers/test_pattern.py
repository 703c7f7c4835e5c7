"""Patterns: what they parse to, which entries they keep, what they accept."""

from __future__ import annotations

import itertools

import pytest
import torch

from pipeline.config.pattern import Pattern
from pipeline.solvers.masks import holds, keep_mask
from storage.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "keep", "group"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:3", 1, 3), (" 3:32 ", 3, 32)]
)
def test_structured_patterns_parse(text: str, keep: int, group: int) -> None:
    pattern = Pattern.parse(text)
    assert (pattern.keep, pattern.group) == (keep, group)
    assert pattern.sparsity == pytest.approx(1 - keep / group)
    assert Pattern.parse(str(pattern)) == pattern


def test_unstructured_parses() -> None:
    pattern = Pattern.parse("unstructured:0.65")
    assert not pattern.structured
    assert pattern.sparsity == 0.65
    assert Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text",
    ["", "2", "4:4", "0:4", "5:4", "2:4:8", "-2:4", "two:four", "unstructured", "unstructured:0",
     "unstructured:1", "unstructured:1.5", "unstructured:-0.5", "unstructured:nan"],
)  # fmt: skip
def test_nonsense_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Pattern.parse(text)
    assert repr(text) in str(caught.value)


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="width 10 is not divisible by 4"):
        Pattern.parse("2:4").check_columns(10)
    Pattern.parse("unstructured:0.5").check_columns(10)


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:4", "4:8", "2:5", "8:32"])
def test_the_largest_of_each_group_are_kept(text: str) -> None:
    pattern = Pattern.parse(text)
    score = torch.rand(7, 6 * pattern.group, generator=torch.Generator().manual_seed(0))
    mask = keep_mask(pattern, score).view(7, 6, pattern.group)
    assert torch.equal(mask.sum(dim=2), torch.full((7, 6), pattern.keep))
    kept = score.view(7, 6, pattern.group).masked_fill(~mask, torch.inf).amin(dim=2)
    pruned = score.view(7, 6, pattern.group).masked_fill(mask, -torch.inf).amax(dim=2)
    assert bool((kept > pruned).all())


def test_ties_keep_the_later_column_whatever_the_group_width() -> None:
    # Every order of four scores of which two or more are equal, against sorting by hand.
    for scores in itertools.product([0.0, 1.0, 2.0], repeat=4):
        order = sorted(range(4), key=lambda j: (scores[j], j))
        mask = keep_mask(Pattern.parse("2:4"), torch.tensor([scores]))
        assert mask[0].nonzero().flatten().tolist() == sorted(order[2:])
    wide = keep_mask(Pattern.parse("16:32"), torch.zeros(1, 32))
    assert wide[0].nonzero().flatten().tolist() == list(range(16, 32))


def test_unstructured_prunes_the_share_of_every_row() -> None:
    score = torch.rand(5, 30, generator=torch.Generator().manual_seed(1))
    mask = keep_mask(Pattern.parse("unstructured:0.7"), score)
    assert torch.equal(mask.sum(dim=1), torch.full((5,), 9))
    for row in range(5):
        assert set(score[row].topk(9).indices.tolist()) == set(mask[row].nonzero()[:, 0].tolist())


def test_holds_sees_one_entry_too_many() -> None:
    pattern = Pattern.parse("2:4")
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 3, 4, 0]])
    assert holds(pattern, weight)
    weight[0, 4] = 1e-30
    assert not holds(pattern, weight)
    assert holds(Pattern.parse("unstructured:0.4"), weight[:, :5])
    assert not holds(Pattern.parse("unstructured:0.9"), torch.ones(4, 40))
