"""`prox24 sweep`: many jobs on one model, one after the other, and their figures in one table.

What jobs of a sweep share, exactly:
- calibration tokens, cut once for all jobs with the same text, number, length and seed (another
  number of sequences gives other crops, as in `prune`, and they are cut anew);
- the text of the evaluation, tokenized once, and the dense model's pass over it, whose last hidden
  states every pruned model is held against.
What they cannot share: calibration passes. A block's inputs are the outputs of the *pruned* blocks
before it, so two settings have the same inputs in block 0 alone, even on the same calibration; that
one block's pass is done again for each.

The state of a sweep is its folder's: `sweep.json` says which sweep it is, `runs/NAME` are run
directories, and a run is done once `report/evaluation.json` is there. A killed sweep goes on with
what is missing.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.config.evaluate import EvalConfig
from pipeline.config.prune import PruneConfig
from pipeline.config.runtime import RuntimeConfig
from pipeline.evaluation.perplexity import Evaluated, Prepared, evaluated, prepare
from pipeline.loop.executor import Executor
from pipeline.models.selection import check_settings
from pipeline.models.skeleton import Skeleton, open_skeleton
from pipeline.preflight.disk import check_evaluation_space
from pipeline.prune import prune
from pipeline.records.evaluation import finite, read_evaluation, write_evaluation
from pipeline.records.manifest import data_identity, describe_job
from pipeline.records.tokens import cut_tokens
from pipeline.reporting.compare_runs import comparison
from pipeline.reporting.run_summary import RunSummary, read_figures
from pipeline.reporting.tables import Table, write_table
from pipeline.runtime.progress import Progress
from pipeline.sweep.grid import Point
from pipeline.sweep.plots import draw
from pipeline.sweep.results import panels, with_dense
from storage.errors import ConfigError, NumericalError, OutputError, RunDirectoryError
from storage.files.commit import is_temporary, publish_json, read_json, replace_json
from storage.object_store import Place
from storage.run.directory import SCRATCH_PREFIX, RunDirectory, differences
from storage.run.lock import RunLock

SWEEP_SCHEMA = 1
_LOCAL_NOTE = (
    "With the local executor all runs are in one process, and peaks of memory are since its start: "
    "a run's is its own only where it is above those before."
)
Executors = Callable[[RuntimeConfig], Callable[[], Executor]]


@dataclass(frozen=True)
class Sweep:
    """A sweep with all options parsed. `points` and their `configs` are in step.

    source: the dense model, called `source_name`. axis: the option on the plots' horizontal axis.
    keep_models: whether pruned models stay, in `models/NAME`, after they were evaluated.
    """

    source: Place
    source_name: str
    folder: Path
    axis: str
    points: tuple[Point, ...]
    configs: tuple[PruneConfig, ...]
    evaluation: EvalConfig
    keep_models: bool

    def run(self, point: Point) -> RunDirectory:
        """The run directory of one of its jobs."""
        return RunDirectory(self.folder / "runs" / point.folder)

    def model(self, point: Point) -> Path:
        """The output of one of its jobs."""
        return self.folder / "models" / point.folder


@dataclass(frozen=True)
class SweepResult:
    """The table of the runs that are done, the files written, and why runs failed, by name."""

    table: Table
    files: tuple[Path, ...]
    failed: dict[str, str]


def sweep(wanted: Sweep, executors: Executors, progress: Progress) -> SweepResult:
    """Runs what is missing of a sweep, and writes its table and plots into its folder.

    `executors` gives what makes the executor of a job or an evaluation. A run that leaves the
    finite numbers is named in the result, and tried again next time.

    Raises an `InputError` for bad input before any compute: of any of the runs, or a folder that
    holds another sweep.
    """
    shared = SharedTokens()
    skeletons = _Skeletons(wanted)
    prepared = prepare(wanted.source, wanted.evaluation)
    identity = _identity(wanted, skeletons, prepared)
    _check_folder(wanted.folder)
    with RunLock(wanted.folder) as lock:
        _own(wanted.folder, identity, lock)
        for left in wanted.folder.glob(f"{SCRATCH_PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        missing = [
            (point, config)
            for point, config in zip(wanted.points, wanted.configs, strict=True)
            if not _done(wanted, point)
        ]
        for _, config in missing:
            shared(skeletons.of(config), config)  # a text that is too short is found now
        failed = _run(wanted, missing, prepared, shared, lock, executors, progress)
        table, files = _written(wanted, lock, plots=True)
    return SweepResult(table, tuple(files), failed)


@dataclass
class SharedTokens:
    """Calibration tokens, cut once for all jobs of a sweep that calibrate on the same ones."""

    cut: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def __call__(self, skeleton: Skeleton, config: PruneConfig) -> Tensor:
        """What `cut_tokens` gives for the config."""
        key = (config.dataset, config.text_column, config.nsamples, config.seqlen, config.seed)
        if key not in self.cut:
            self.cut[key] = cut_tokens(skeleton, config)
        return self.cut[key]


class _Skeletons:
    """The dense model's skeleton in each dtype that is asked for."""

    def __init__(self, wanted: Sweep) -> None:
        self._source = wanted.source
        self._open: dict[tuple[Any, ...], Skeleton] = {}

    def of(self, config: PruneConfig) -> Skeleton:
        """Opens it, or gives the one that is open."""
        key = (config.dtype, config.trust_remote_code)
        if key not in self._open:
            self._open[key] = open_skeleton(
                self._source, dtype=config.dtype, trust_remote_code=config.trust_remote_code
            )
        return self._open[key]


def _identity(wanted: Sweep, skeletons: _Skeletons, prepared: Prepared) -> dict[str, Any]:
    """What a sweep is, as JSON free of local paths: equal for equal sweeps.

    Raises an `InputError` where a run cannot be, and `ConfigError` where two are the same job.
    """
    texts = {name: data_identity(name) for name in {config.dataset for config in wanted.configs}}
    runs: dict[str, dict[str, Any]] = {}
    for point, config in zip(wanted.points, wanted.configs, strict=True):
        skeleton = skeletons.of(config)
        check_settings(skeleton, config)
        runs[point.folder] = describe_job(config, skeleton, texts[config.dataset])
    _require_distinct(wanted.points, wanted.configs)
    evaluation = wanted.evaluation
    return {
        "runs": runs,
        "evaluation": {
            "dataset": prepared.dataset,
            "revision": prepared.revision,
            "text_column": evaluation.text_column,
            "seqlen": evaluation.seqlen,
            "nsamples": evaluation.nsamples,
            "dtype": evaluation.dtype,
        },
    }


def _require_distinct(points: Sequence[Point], configs: Sequence[PruneConfig]) -> None:
    """Raises `ConfigError` where two runs would compute the same."""
    seen: dict[str, str] = {}
    for point, config in zip(points, configs, strict=True):
        solver = config.solver_settings(config.method).to_json()
        settings = {**config.what(), **solver}
        if all(own.refine == "none" for own in config.layer_rules().all_settings()):
            settings["refine_steps"] = None
        key = repr(sorted(settings.items()))
        if key in seen:
            raise ConfigError(
                f"the runs {seen[key]} and {point.name} are the same job: what tells them apart "
                "has no effect on them (steps of a refinement need `refine`); leave one out"
            )
        seen[key] = point.name


def _check_folder(folder: Path) -> None:
    """Raises `OutputError` for a folder with things in it that are no sweep's."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder for the sweep")
    if folder.is_dir() and not (folder / "sweep.json").exists():
        for path in folder.iterdir():
            if not path.name.startswith("lock-") and not is_temporary(path):
                raise OutputError(f"{folder} is not empty and no sweep's; name another folder")


def _own(folder: Path, identity: dict[str, Any], lock: RunLock) -> None:
    """Makes the folder this sweep's. Raises `RunDirectoryError` where it is another's."""
    path = folder / "sweep.json"
    if path.exists():
        found = differences(read_json(path, SWEEP_SCHEMA)["sweep"], identity)
        if found:
            raise RunDirectoryError(
                f"{folder} is the folder of another sweep ({'; '.join(found[:3])}); name another "
                "folder, or delete it to start anew"
            )
        return
    payload = {"schema_version": SWEEP_SCHEMA, "sweep": identity}
    publish_json(path, payload, guard=lock.assert_held)


def _done(wanted: Sweep, point: Point) -> bool:
    return read_evaluation(wanted.run(point)) is not None


def _run(
    wanted: Sweep,
    missing: Sequence[tuple[Point, PruneConfig]],
    prepared: Prepared,
    shared: SharedTokens,
    lock: RunLock,
    executors: Executors,
    progress: Progress,
) -> dict[str, str]:
    """Runs and evaluates what is missing; why runs failed, by name."""
    failed: dict[str, str] = {}
    if not missing:
        return failed
    done = len(wanted.points) - len(missing)
    if done:
        progress.note(f"{done} of {len(wanted.points)} runs are already done; going on from there")
    evaluation = replace(wanted.evaluation, scratch_dir=str(wanted.folder))
    check_evaluation_space(evaluation, prepared.skeleton, -(-3 * len(prepared.tokens) // 2))
    with _evaluated(prepared, evaluation, executors, progress) as dense:
        payload = {"schema_version": SWEEP_SCHEMA, **dense.figures()}
        replace_json(wanted.folder / "dense.json", payload, guard=lock.assert_held)
        began = time.monotonic()
        for number, (point, config) in enumerate(missing):
            progress.note(f"run {done + number + 1} of {len(wanted.points)}: {point.name}")
            try:
                figures = _one(
                    wanted, point, config, shared, evaluation, dense, executors, progress
                )
            except NumericalError as error:
                failed[point.name] = str(error)
                progress.note(f"{point.name}: failed: {error}")
                continue
            write_evaluation(wanted.run(point), figures, lock.assert_held)
            _written(wanted, lock)  # what is known so far, for who watches
            each = (time.monotonic() - began) / (number + 1)
            left = datetime.timedelta(seconds=round(each * (len(missing) - number - 1)))
            progress.note(
                f"{point.name}: perplexity {figures['perplexity']:.4g}; all done in about {left}"
            )
    return failed


def _one(
    wanted: Sweep,
    point: Point,
    config: PruneConfig,
    shared: SharedTokens,
    evaluation: EvalConfig,
    dense: Evaluated,
    executors: Executors,
    progress: Progress,
) -> dict[str, Any]:
    """Prunes, or goes on with it, and holds the result against the dense model."""
    config = replace(config, run_dir=str(wanted.run(point).path))
    output = wanted.model(point)
    prune(
        wanted.source,
        output,
        config,
        executors(config),
        progress,
        source_name=wanted.source_name,
        cut=shared,
    )
    # The tokenizer is the dense model's, and so are the tokens.
    skeleton = open_skeleton(
        output, dtype=evaluation.dtype, trust_remote_code=evaluation.trust_remote_code
    )
    pruned = replace(dense.prepared, skeleton=skeleton)
    with _evaluated(pruned, evaluation, executors, progress) as other:
        return finite(other.figures() | {"against_dense": other.against(dense)})


@contextlib.contextmanager
def _evaluated(
    prepared: Prepared, config: EvalConfig, executors: Executors, progress: Progress
) -> Iterator[Evaluated]:
    """`evaluated` on an executor of its own."""
    executor = executors(config)()
    try:
        with evaluated(prepared, config, executor, progress) as found:
            progress.end()
            yield found
    finally:
        progress.end()
        executor.close()


def _discard(wanted: Sweep, point: Point) -> None:
    if not wanted.keep_models:
        shutil.rmtree(wanted.model(point), ignore_errors=True)


def _written(wanted: Sweep, lock: RunLock, *, plots: bool = False) -> tuple[Table, list[Path]]:
    """The table, and the plots, of what is done, written into the folder."""
    done = [point for point in wanted.points if _done(wanted, point)]
    for point in done:
        # Here, or it would stay where the sweep was killed after the evaluation's commit.
        _discard(wanted, point)
    figures = {point.name: read_figures(wanted.run(point).path, point.name) for point in done}
    _require_one_model(list(figures.values()))
    path = wanted.folder / "dense.json"
    dense = read_json(path, SWEEP_SCHEMA) if path.exists() else {}
    table = with_dense(comparison(list(figures.values())), dense)
    if any(config.executor == "local" for config in wanted.configs):
        table = replace(table, notes=(*table.notes, _LOCAL_NOTE))
    files = write_table(wanted.folder, "sweep", table, lock.assert_held)
    if plots and done:
        drawn = panels(wanted.points, figures, dense)
        files += draw(wanted.folder, "sweep", wanted.axis, drawn, lock.assert_held)
    return table, files


def _require_one_model(runs: Sequence[RunSummary]) -> None:
    """Raises `RunDirectoryError` where the source's weights changed between two runs."""
    for run in runs[1:]:
        changed = differences(runs[0].weight_files, run.weight_files)
        if changed:
            raise RunDirectoryError(
                f"the source's weights changed between the runs {runs[0].name} and {run.name} "
                f"({changed[0]}); restore them, and delete the runs made from others"
            )
