"""Saves the layers that `--save-layers` names, with their Hessians, for `prox24 solve`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from functools import partial

from torch import Tensor

from pipeline.messages import Job
from pipeline.solvers.hessian import require_hessian
from pipeline.statistics.accumulate import HalvedStatistics, merged
from storage.run.directory import RunDirectory
from storage.run.layer_files import write_layer_file
from storage.run.lock import require_owner


def saved_layers(pattern: str | None, prefix: str, layers: Iterable[str]) -> list[str]:
    """The layers of a block whose full name, `prefix` + layer, matches the glob `pattern`."""
    wanted = (layer for layer in layers if pattern is not None)
    return [layer for layer in wanted if fnmatch.fnmatchcase(prefix + layer, pattern or "")]


def save_layer(
    job: Job, run: RunDirectory, name: str, weight: Tensor, halves: HalvedStatistics
) -> None:
    """Writes a layer's weight (R, C) and Hessian (C, C) to `layers/NAME.safetensors`.

    Does nothing if no token reached the layer.
    """
    total = merged(halves)
    if total is None or not total.full or not total.tokens:
        return
    write_layer_file(
        run.path / "layers" / f"{name}.safetensors",
        weight=weight,
        hessian=require_hessian(total),
        tokens=total.tokens,
        sequences=total.sequences,
        guard=partial(require_owner, job.lock_file),
    )
