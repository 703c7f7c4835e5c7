"""The file of a run directory that says how well its finished model predicts text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.records.schemas import EVALUATION_SCHEMA
from storage.files.commit import read_json, replace_json
from storage.run.directory import RunDirectory


def write_evaluation(
    run: RunDirectory, figures: Mapping[str, Any], guard: Callable[[], None] | None = None
) -> None:
    """Writes `report/evaluation.json`: what `pipeline.evaluation.perplexity.measure_perplexity`
    returns.

    `figures` may also have `against_dense`, as `against_first` of
    `pipeline.evaluation.perplexity.compare`. What is not finite (a divergence can be infinite) is
    written as null. `guard` as in `replace_json`.
    """
    payload = {"schema_version": EVALUATION_SCHEMA, **finite(figures)}
    replace_json(run.evaluation(), payload, guard=guard)


def read_evaluation(run: RunDirectory) -> dict[str, Any] | None:
    """The same figures; None where the run's model was not evaluated.

    Raises `CorruptFileError` where the file is damaged.
    """
    if not run.evaluation().exists():
        return None
    figures = read_json(run.evaluation(), EVALUATION_SCHEMA)
    del figures["schema_version"]
    return figures


def finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The same figures, None in place of those that are infinite or no numbers."""
    return {
        key: finite(value)
        if isinstance(value, Mapping)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in figures.items()
    }
