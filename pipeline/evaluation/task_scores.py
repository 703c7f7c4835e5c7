"""Metrics of lm-eval's tasks, and their differences between two models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.perplexity import mean_and_error


@dataclass(frozen=True)
class Metric:
    """A task's metric. documents: the values of its documents, if `value` is their mean."""

    value: float
    documents: tuple[float, ...] | None

    @property
    def standard_error(self) -> float:
        """The standard error of the value over documents; NaN if it is not their mean."""
        return math.nan if self.documents is None else mean_and_error(self.documents)[1]

    def against(self, first: Metric) -> tuple[float, float]:
        """The difference from another model's metric and its standard error, paired by document.

        The standard error is NaN if a value is not a mean over documents.
        """
        if self.documents is None or first.documents is None:
            return self.value - first.value, math.nan
        differences = [a - b for a, b in zip(self.documents, first.documents, strict=True)]
        return mean_and_error(differences)


def task_metrics(results: Mapping[str, Any]) -> dict[str, dict[str, Metric]]:
    """Task → metric's name → metric. results: what lm-eval's `evaluate` returns, with samples.

    A filter's name follows the metric's name, as in `exact_match,strict`, unless it is `none`.
    """
    metrics: dict[str, dict[str, Metric]] = {}
    for task, samples in results["samples"].items():
        for key, value in results["results"][task].items():
            name, _, filter_name = key.partition(",")
            if not filter_name or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            matching = sorted(
                (s for s in samples if s["filter"] == filter_name and name in s),
                key=lambda sample: sample["doc_id"],
            )
            documents = _documents([sample[name] for sample in matching], float(value))
            title = name if filter_name == "none" else key
            metrics.setdefault(task, {})[title] = Metric(float(value), documents)
    return metrics


def _documents(values: list[Any], mean: float) -> tuple[float, ...] | None:
    """The documents' values, if `mean` is their mean; else None."""
    if not values or not all(isinstance(value, (int, float)) for value in values):
        return None
    numbers = tuple(float(value) for value in values)
    same = math.isclose(math.fsum(numbers) / len(numbers), mean, rel_tol=1e-6, abs_tol=1e-9)
    return numbers if same else None
