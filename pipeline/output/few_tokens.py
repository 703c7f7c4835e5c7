"""Which experts saw few calibration tokens, of a job's results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def few_tokens(layers: Iterable[Mapping[str, Any]], least: int) -> dict[str, int]:
    """Name -> tokens of the experts' layers that saw fewer than `least`, of a job's results."""
    return {
        layer["name"]: layer["tokens"]
        for layer in layers
        if ".experts." in layer["name"]
        and layer["statistic"] != "none"
        and layer["tokens"] < max(least, 1)
    }
