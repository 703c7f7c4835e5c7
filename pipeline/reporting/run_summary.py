"""The settings and results of a finished job, read from its run directory; no model, no Ray."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.reconstruct.results import totals
from pipeline.records.evaluation import read_evaluation
from pipeline.records.schemas import MANIFEST_SCHEMA
from pipeline.records.status import find_run_directory, read_status
from pipeline.records.summary import read_summary
from pipeline.solvers.types import percentage
from storage.errors import CorruptFileError, RunDirectoryError
from storage.files.commit import read_json
from storage.run.directory import RunDirectory

Scalar = str | int | float | bool | None

# Perplexities are comparable only where all of these are equal.
_EVALUATION_SETTINGS = ("dataset", "revision", "seqlen", "nsamples", "dtype")


@dataclass(frozen=True)
class KindError:
    """The error of the layers of one kind (`self_attn.q_proj`) in all blocks together.

    layers: their number. objective, objective_zero: sums over these layers; see
    `pipeline.solvers.types.SolveReport`.
    """

    layers: int
    objective: float
    objective_zero: float

    @property
    def relative_error(self) -> float | None:
        """In percent, as for a block; None where it is undefined (see `percentage`)."""
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

    settings: everything that determines the result, flat, with the defaults of the solver, and with
    the settings of its evaluation if there is one. evaluation: `report/evaluation.json`, or None.
    kinds: by kind of layer, in model order. statistic: the form of H in the objectives, which are
    comparable only with the same form. wall: seconds of all phases. seconds: by kind of work.
    memory: peak bytes (see `pipeline.records.summary.summarize`). world: number of workers of the
    last block. weight_files: name -> SHA-256 of the files of the source. reconstruction: see
    `pipeline.reconstruct.results.totals`.
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
    reconstruction: dict[str, Any] | None = None

    @property
    def whole(self) -> KindError:
        """All pruned layers together."""
        return sum(self.kinds.values(), NO_LAYERS)


def read_run_summary(path: Path, name: str) -> RunSummary:
    """The summary of the job with run directory, or OUTPUT, `path`; `name` is its name in tables.

    Raises `RunDirectoryError` if there is no run directory or its job has not finished, and
    `CorruptFileError` for a damaged file.
    """
    run = find_run_directory(path)
    status = read_status(run)
    if status["state"] != "finished":
        # What cannot be read may be why it does not seem so.
        raise RunDirectoryError(
            next(iter(status["problems"]), None)
            or f"{run.path}: its job has not finished ({status['state']}); run its command again "
            "to finish it"
        )
    manifest, summary = read_json(run.manifest, MANIFEST_SCHEMA), read_summary(run)
    try:
        return _run_summary(run, name, manifest, summary)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{run.path}: run.json or report/summary.json was written by another version of "
            "prox24, or is damaged; use the version that wrote it"
        ) from error


def _run_summary(
    run: RunDirectory, name: str, manifest: dict[str, Any], summary: dict[str, Any]
) -> RunSummary:
    evaluation = read_evaluation(run)
    kinds: dict[str, KindError] = {}
    statistics: set[str] = set()
    for block in summary["blocks"]:
        for layer, report in block["layers"].items():
            kind = kind_of(layer)
            error = KindError(1, float(report["objective"]), float(report["objective_zero"]))
            kinds[kind] = kinds.get(kind, NO_LAYERS) + error
            statistics.add(str(report["statistic"]))
    job = manifest["job"]
    # The settings of the solver are options, too, with defaults filled in.
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
        reconstruction=totals(block.get("reconstruct") for block in summary["blocks"]),
    )


def kind_of(layer: str) -> str:
    """The kind of a layer: its name in the block, with numbers (of experts) replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            known = value is None or isinstance(value, (str, int, float))
            yield f"{prefix}{key}", value if known else str(value)
