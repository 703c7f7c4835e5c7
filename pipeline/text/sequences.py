"""Token sequences that were cut from a text, with what was read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TokenSequences:
    """Sequences of equal length.

    ids: (n, seqlen) int64. counted: (n, seqlen) bool, the tokens whose statistics are taken; None
    for all of them. text: what was read and how, as JSON, for the job's records.
    """

    ids: Tensor
    counted: Tensor | None = None
    text: dict[str, Any] = field(default_factory=dict)
