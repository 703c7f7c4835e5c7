"""What lm-eval found of a task's documents, and how it differs between two models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.perplexity import mean_and_error


@dataclass(frozen=True)
class Metric:
    """A task's metric: its value, and that of each document where the value is their mean."""

    value: float
    documents: tuple[float, ...] | None

    @property
    def standard_error(self) -> float:
        """Of the value over the documents; NaN where it is not their mean."""
        return math.nan if self.documents is None else mean_and_error(self.documents)[1]

    def against(self, first: Metric) -> tuple[float, float]:
        """The difference from another model's metric, and its standard error, paired by document
        (NaN where a value is not a mean over documents)."""
        if self.documents is None or first.documents is None:
            return self.value - first.value, math.nan
        differences = [a - b for a, b in zip(self.documents, first.documents, strict=True)]
        return mean_and_error(differences)


def task_metrics(results: Mapping[str, Any]) -> dict[str, dict[str, Metric]]:
    """Task -> metric -> figures, of what lm-eval's `evaluate` returns with its samples.

    A filter's name follows the metric's, `exact_match,strict`, where it is not `none`.
    """
    found: dict[str, dict[str, Metric]] = {}
    for task, samples in results["samples"].items():
        for key, value in results["results"][task].items():
            name, _, kept = key.partition(",")
            if not kept or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            own = sorted(
                (sample for sample in samples if sample["filter"] == kept and name in sample),
                key=lambda sample: sample["doc_id"],
            )
            documents = _documents([sample[name] for sample in own], float(value))
            title = name if kept == "none" else key
            found.setdefault(task, {})[title] = Metric(float(value), documents)
    return found


def _documents(values: list[Any], mean: float) -> tuple[float, ...] | None:
    """The documents' values if `mean` is what the name says."""
    if not values or not all(isinstance(value, (int, float)) for value in values):
        return None
    numbers = tuple(float(value) for value in values)
    same = math.isclose(math.fsum(numbers) / len(numbers), mean, rel_tol=1e-6, abs_tol=1e-9)
    return numbers if same else None
