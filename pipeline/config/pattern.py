"""Sparsity patterns: N:M (keep N of every M consecutive inputs) and unstructured.

Shapes: R rows (output features), C columns (input features), M the group width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from storage.errors import ConfigError


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern: which entries of a weight may be non-zero.

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
        """Raise ConfigError if a row of ``columns`` entries cannot be divided into groups of M."""
        if columns < 1 or (self.structured and columns % self.group):
            raise ConfigError(
                f"width {columns} is not divisible by {max(self.group, 1)}, as pattern {self} needs"
            )

    def pruned_per_row(self, columns: int) -> int:
        """Entries of a row of ``columns`` that an unstructured pattern, applied per row, prunes."""
        return int(columns * self.sparsity)
