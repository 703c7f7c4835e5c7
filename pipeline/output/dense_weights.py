"""What of a model's blocks is never pruned, put in words."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def dense_in_words(dense: Mapping[str, str]) -> list[tuple[str, str]]:
    """(reason, names), of weights that stay dense by name; those of all blocks as one name.

    `model.layers.*.mlp.gate.weight (48)` are that weight of 48 blocks.
    """
    reasons: dict[str, dict[str, int]] = {}
    for name, reason in dense.items():
        counts = reasons.setdefault(reason, {})
        pattern = _NUMBER.sub("*", name)
        counts[pattern] = counts.get(pattern, 0) + 1
    return [
        (reason, ", ".join(f"{name} ({count})" for name, count in counts.items()))
        for reason, counts in reasons.items()
    ]
