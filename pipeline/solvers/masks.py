"""Which entries of a weight a pattern keeps, and whether a weight has the pattern.

Shapes: R rows (output features), C columns (input features), M the group width, G = C / M groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config.pattern import Pattern

PAIRWISE_LIMIT = 16  # above this width, sorting beats the M(M-1)/2 comparisons


def keep_mask(pattern: Pattern, score: Tensor) -> Tensor:
    """The entries with the largest `score`: (R, C) float -> (R, C) bool, True where kept.

    N:M: the N largest of each group; unstructured: the largest of each row. Among equal scores the
    later column is kept, on every device: the choice does not depend on other rows or on an
    unstable sort. Raises ConfigError where the pattern does not divide C.
    """
    rows, columns = score.shape
    pattern.check_columns(columns)
    if not pattern.structured:
        order = torch.argsort(score, dim=1, stable=True)
        mask = torch.ones_like(score, dtype=torch.bool)
        return mask.scatter_(1, order[:, : pattern.pruned_per_row(columns)], False)
    grouped = score.reshape(rows, columns // pattern.group, pattern.group)
    pruned = pattern.group - pattern.keep
    if pattern.group > PAIRWISE_LIMIT:
        order = torch.argsort(grouped, dim=2, stable=True)
        kept = torch.ones_like(grouped, dtype=torch.bool).scatter_(2, order[..., :pruned], False)
    else:
        kept = torch.stack(_ranks(grouped), dim=2) >= pruned
    return kept.reshape(rows, columns)


def holds(pattern: Pattern, weight: Tensor) -> bool:
    """Whether `weight` (R, C) has the pattern: N:M, or the share of zeros if unstructured."""
    rows, columns = weight.shape
    if not pattern.structured:
        zeros = int((weight == 0).sum())
        return zeros >= int(rows * columns * pattern.sparsity) - rows
    pattern.check_columns(columns)
    used = (weight != 0).reshape(rows, columns // pattern.group, pattern.group).sum(dim=2)
    return bool((used <= pattern.keep).all())


def _ranks(grouped: Tensor) -> list[Tensor]:
    """Rank of every entry in its group: (R, G, M) -> M tensors (R, G) int8; 0 is the smallest."""
    width = grouped.shape[2]
    ranks = [
        torch.zeros(grouped.shape[:2], dtype=torch.int8, device=grouped.device)
        for _ in range(width)
    ]
    for first in range(width):
        for second in range(first + 1, width):
            first_is_larger = (grouped[..., first] > grouped[..., second]).to(torch.int8)
            ranks[first] += first_is_larger
            ranks[second] += 1 - first_is_larger
    return ranks
