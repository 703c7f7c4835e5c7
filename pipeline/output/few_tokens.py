"""Lists the experts that got few calibration tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def few_tokens(layers: Iterable[Mapping[str, Any]], least: int) -> dict[str, int]:
    """Name → tokens, for layers of experts with fewer than `least` (at least 1) tokens.

    layers: those of a job's results. Layers of a method without statistics are left out.
    """
    return {
        layer["name"]: layer["tokens"]
        for layer in layers
        if ".experts." in layer["name"]
        and layer["statistic"] != "none"
        and layer["tokens"] < max(least, 1)
    }
