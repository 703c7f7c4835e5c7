"""`report/evaluation.json`: the perplexity of a run's finished model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.records.schemas import EVALUATION_SCHEMA
from storage.files.commit import read_json, replace_json
from storage.run.directory import RunDirectory


def write_evaluation(
    run: RunDirectory, metrics: Mapping[str, Any], guard: Callable[[], None] | None = None
) -> None:
    """Writes `report/evaluation.json`.

    metrics: what `pipeline.evaluation.perplexity.measure_perplexity` returns, perhaps with
    `against_dense`, which is `against_first` of `pipeline.evaluation.perplexity.compare`. A value
    that is not finite (a divergence can be infinite) is written as null. guard: as in
    `replace_json`.
    """
    payload = {"schema_version": EVALUATION_SCHEMA, **finite(metrics)}
    replace_json(run.evaluation(), payload, guard=guard)


def read_evaluation(run: RunDirectory) -> dict[str, Any] | None:
    """The metrics in `report/evaluation.json`; None if the run's model was not evaluated.

    Raises `CorruptFileError` if the file is damaged.
    """
    if not os.path.lexists(run.evaluation()):  # a broken link is damage
        return None
    metrics = read_json(run.evaluation(), EVALUATION_SCHEMA)
    del metrics["schema_version"]
    return metrics


def finite(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The same metrics, with None in place of NaN and infinite values."""
    return {
        key: finite(value)
        if isinstance(value, Mapping)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in metrics.items()
    }
