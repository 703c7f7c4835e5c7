"""Sparsity patterns: N:M (keep N of every M consecutive inputs) and unstructured.

Shapes: R rows (output features), C columns (input features), M the group width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from storage.errors import ConfigError

_PAIRWISE_LIMIT = 16  # above this width, sorting beats the M(M-1)/2 comparisons


@dataclass(frozen=True)
class Pattern:
    """Which entries of a weight may be non-zero.

    ``keep``/``group``: N and M of an N:M pattern; both 0 for an unstructured one.
    ``sparsity``: share of entries that become zero, in [0, 1).
    """

    keep: int
    group: int
    sparsity: float

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read ``"2:4"``, any ``"N:M"`` (keeps N of M), or ``"unstructured:0.5"``.

        Raises ConfigError for anything else.
        """
        if match := re.fullmatch(r"\s*(\d{1,4}):(\d{1,4})\s*", text):
            keep, group = int(match[1]), int(match[2])
            if not 0 < keep < group:
                raise ConfigError(f"pattern {text!r} must keep N of M with 0 < N < M, as in 2:4")
            return cls(keep, group, 1 - keep / group)
        if match := re.fullmatch(r"\s*unstructured:(\d*\.?\d+)\s*", text):
            sparsity = float(match[1])
            if not 0 < sparsity < 1:
                raise ConfigError(f"pattern {text!r} must have a sparsity between 0 and 1")
            return cls(0, 0, sparsity)
        raise ConfigError(f"unknown pattern {text!r}: give N:M, as in 2:4, or unstructured:0.5")

    @property
    def structured(self) -> bool:
        """True for N:M."""
        return self.group > 0

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" if self.structured else f"unstructured:{self.sparsity:g}"

    def check_columns(self, columns: int) -> None:
        """Raise ConfigError where a row of ``columns`` entries cannot be cut in groups of M."""
        if columns < 1 or (self.structured and columns % self.group):
            raise ConfigError(
                f"width {columns} is not divisible by {max(self.group, 1)}, as pattern {self} needs"
            )

    def pruned_per_row(self, columns: int) -> int:
        """Entries of a row of ``columns`` that an unstructured per-row choice sets to zero."""
        return int(columns * self.sparsity)

    def keep_mask(self, score: Tensor) -> Tensor:
        """The entries with the largest ``score``: (R, C) float -> (R, C) bool, True where kept.

        N:M: the N largest of each group; unstructured: the largest of each row. Among equal
        scores the later column is kept, on every device, so that the choice depends neither on
        the other rows nor on a library's unstable selection.
        """
        rows, columns = score.shape
        self.check_columns(columns)
        if not self.structured:
            order = torch.argsort(score, dim=1, stable=True)
            mask = torch.ones_like(score, dtype=torch.bool)
            return mask.scatter_(1, order[:, : self.pruned_per_row(columns)], False)
        grouped = score.reshape(rows, columns // self.group, self.group)
        pruned = self.group - self.keep
        if self.group > _PAIRWISE_LIMIT:
            order = torch.argsort(grouped, dim=2, stable=True)
            kept = torch.ones_like(grouped, dtype=torch.bool).scatter_(
                2, order[..., :pruned], False
            )
        else:
            kept = torch.stack(_ranks(grouped), dim=2) >= pruned
        return kept.reshape(rows, columns)

    def holds(self, weight: Tensor) -> bool:
        """Whether ``weight`` (R, C) obeys N:M, or has the share of zeros of an unstructured one."""
        rows, columns = weight.shape
        if not self.structured:
            zeros = int((weight == 0).sum())
            return zeros >= int(rows * columns * self.sparsity) - rows
        self.check_columns(columns)
        used = (weight != 0).reshape(rows, columns // self.group, self.group).sum(dim=2)
        return bool((used <= self.keep).all())


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
