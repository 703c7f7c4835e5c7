"""What a finished job is known by, read from its run directory alone: needs no model, no Ray."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.records.evaluation import read_evaluation
from pipeline.records.schemas import MANIFEST_SCHEMA
from pipeline.records.status import find_run_directory, read_status
from pipeline.records.summary import read_summary
from pipeline.solvers.types import percentage
from storage.errors import CorruptFileError, RunDirectoryError
from storage.files.commit import read_json
from storage.run.directory import RunDirectory

Scalar = str | int | float | bool | None

# What decides how a perplexity compares with others.
_EVALUATION_SETTINGS = ("dataset", "revision", "seqlen", "nsamples", "dtype")


@dataclass(frozen=True)
class KindError:
    """The layers of one kind (`self_attn.q_proj`), of all blocks: their objectives summed.

    objective, objective_zero: see `pipeline.solvers.types.SolveReport`.
    """

    layers: int
    objective: float
    objective_zero: float

    @property
    def relative_error(self) -> float:
        """In per cent, as a block's."""
        return percentage(self.objective, self.objective_zero)

    def __add__(self, other: KindError) -> KindError:
        return KindError(
            self.layers + other.layers,
            self.objective + other.objective,
            self.objective_zero + other.objective_zero,
        )


NO_LAYERS = KindError(0, 0.0, 0.0)


@dataclass(frozen=True)
class RunSummary:
    """One finished job.

    settings: everything that decides its result, flat, the solver's defaults filled in; with those
    of its evaluation, where there is one. evaluation: `report/evaluation.json`, or None. kinds: by
    kind of layer, in model order. statistic: what stood for H in the objectives; those of two
    statistics do not compare. wall: seconds of all phases. seconds: those by kind of work. memory:
    peak bytes (see `pipeline.records.summary.summarize`). world: ranks, at the end. weight_files:
    SHA-256 of the source's files.
    """

    name: str
    settings: dict[str, Scalar]
    evaluation: dict[str, Any] | None
    kinds: dict[str, KindError]
    statistic: str
    wall: float
    seconds: dict[str, float]
    memory: dict[str, int]
    world: int
    weight_files: dict[str, str]

    @property
    def whole(self) -> KindError:
        """All pruned layers together."""
        return sum(self.kinds.values(), NO_LAYERS)


def read_figures(path: Path, name: str) -> RunSummary:
    """The figures of the job whose run directory, or whose OUTPUT, is `path`.

    Raises `RunDirectoryError` where it is none, or its job has not finished, `CorruptFileError`
    where a file of it is damaged.
    """
    run = find_run_directory(path)
    state = read_status(run)["state"]
    if state != "finished":
        raise RunDirectoryError(
            f"{run.path}: its job has not finished ({state}); run its command again to finish it"
        )
    manifest, summary = read_json(run.manifest, MANIFEST_SCHEMA), read_summary(run)
    try:
        return _figures(run, name, manifest, summary)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{run.path}: run.json or report/summary.json is not as this prox24 writes it; use the "
            "version that wrote it"
        ) from error


def _figures(
    run: RunDirectory, name: str, manifest: dict[str, Any], summary: dict[str, Any]
) -> RunSummary:
    evaluation = read_evaluation(run)
    kinds: dict[str, KindError] = {}
    statistics: set[str] = set()
    for block in summary["blocks"]:
        for layer, report in block["layers"].items():
            kind = kind_of(layer)
            own = KindError(1, float(report["objective"]), float(report["objective_zero"]))
            kinds[kind] = kinds.get(kind, NO_LAYERS) + own
            statistics.add(str(report["statistic"]))
    job = manifest["job"]
    # The solver's settings have the options of the same name with their defaults filled in.
    settings = {**job["settings"], **job["solver"]}
    settings |= {key: value for key, value in job.items() if key not in ("settings", "solver")}
    if evaluation is not None:
        settings["evaluation"] = {key: evaluation.get(key) for key in _EVALUATION_SETTINGS}
    return RunSummary(
        name=name,
        settings=dict(_flat(settings)),
        evaluation=evaluation,
        kinds=kinds,
        statistic=" and ".join(sorted(statistics)),
        wall=float(summary["wall"]),
        seconds={kind: float(value) for kind, value in summary["seconds"].items()},
        memory={who: int(value) for who, value in summary["memory"].items()},
        world=int(summary["blocks"][-1]["world"]),
        weight_files=dict(manifest["weight_files"]),
    )


def kind_of(layer: str) -> str:
    """The kind of a layer: its name in the block, numbers (of experts) made alike."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            known = value is None or isinstance(value, (str, int, float))
            yield f"{prefix}{key}", value if known else str(value)
