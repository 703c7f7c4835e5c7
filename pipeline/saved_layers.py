"""The layers that `--save-layers` names, written out for `prox24 solve`."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from pipeline.statistics import FoldedStatistics, merged
from storage.layer_files import write_layer_file


def is_saved(pattern: str | None, name: str) -> bool:
    """Whether the layer of that whole name is one of those that `pattern` (a glob) names."""
    return pattern is not None and fnmatch.fnmatchcase(name, pattern)


def save_layers(
    run: Path,
    names: Iterable[str],
    folds: FoldedStatistics,
    weight: Callable[[str], Tensor],
    guard: Callable[[], None],
) -> None:
    """Writes layers that share an input into the run directory's `layers` folder.

    names: whole names. weight: gives a layer's weight (R, C). guard: runs before each is written.
    """
    total = merged(folds)
    if total is None or total.hessian is None:
        return
    for name in names:
        write_layer_file(
            run / "layers" / f"{name}.safetensors",
            weight=weight(name),
            hessian=total.hessian,
            tokens=total.tokens,
            sequences=total.sequences,
            guard=guard,
        )
