"""`prox24 sweep`: many jobs on one model, one after another, with their results in one table.

The jobs of a sweep share:
- calibration tokens, cut once for all jobs with the same text, nsamples, seqlen and seed (another
  nsamples gives other sequences, as in `prune`);
- the evaluation text, tokenized once, and the dense model's pass over it, with whose last hidden
  states every pruned model is compared.
They do not share calibration passes. The inputs of a block are the outputs of the *pruned* blocks
before it, so two settings have the same inputs only in block 0, and that pass is repeated, too.

The state of a sweep is its folder: `sweep.json` identifies the sweep, `runs/NAME` are run
directories, and a run is done when its `report/evaluation.json` exists. A killed sweep resumes with
the missing runs.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.config.evaluate import EvalConfig
from pipeline.config.prune import PruneConfig
from pipeline.config.runtime import RuntimeConfig, how_to_open
from pipeline.evaluation.perplexity import Evaluated, Prepared, evaluated, prepare
from pipeline.loop.executor import Executor
from pipeline.models.selection import check_settings
from pipeline.models.skeleton import Skeleton, open_skeleton
from pipeline.preflight.disk import check_evaluation_space
from pipeline.prune import prune
from pipeline.records.evaluation import finite, read_evaluation, write_evaluation
from pipeline.records.manifest import data_identity, describe_job, text_identity
from pipeline.records.tokens import as_asked, cut_tokens
from pipeline.reporting.compare_runs import comparison
from pipeline.reporting.run_summary import RunSummary, read_run_summary
from pipeline.reporting.tables import Table, write_table
from pipeline.runtime.progress import Progress
from pipeline.sweep.grid import Point
from pipeline.sweep.plots import draw
from pipeline.sweep.results import panels, with_dense
from pipeline.text.sequences import TokenSequences
from storage.errors import ConfigError, NumericalError, OutputError, RunDirectoryError
from storage.files.commit import publish_json, read_json, replace_json
from storage.files.listing import delete_folder, listed
from storage.files.temporary import is_temporary
from storage.files.trial import refusing, try_folder
from storage.object_store import Place, lies_in, resolved
from storage.run.directory import SCRATCH_PREFIX, RunDirectory, differences
from storage.run.lock import RunLock

SWEEP_SCHEMA = 1
_LOCAL_NOTE = (
    "With the local executor all runs share one process, and peak memory is measured since its "
    "start: the peak of a run is known only where it is above those of the runs before."
)
Executors = Callable[[RuntimeConfig], Callable[[], Executor]]


@dataclass(frozen=True)
class Sweep:
    """A sweep with all options parsed.

    source: the dense model. source_name: its name in messages. axis: the option on the horizontal
    axis of the plots. configs: those of `points`, in the same order. keep_models: whether pruned
    models are kept, in `models/NAME`, after their evaluation.
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
        """The run directory of a job."""
        return RunDirectory(self.folder / "runs" / point.folder)

    def model(self, point: Point) -> Path:
        """The output folder of a job."""
        return self.folder / "models" / point.folder


@dataclass(frozen=True)
class SweepResult:
    """The table of the finished runs, the files written, and name -> reason for failed runs."""

    table: Table
    files: tuple[Path, ...]
    failed: dict[str, str]


def sweep(wanted: Sweep, executors: Executors, progress: Progress) -> SweepResult:
    """Runs the missing jobs of a sweep, and writes its table and plots into its folder.

    executors: config -> a function that creates the executor of a job or an evaluation. A run that
    produces NaN or Inf is named in the result, and tried again next time.
    Raises an `InputError` before any computation for bad input of any run, and for a folder that
    contains another sweep.
    """
    shared = SharedTokens()
    skeletons = _Skeletons(wanted)
    prepared = prepare(wanted.source, wanted.evaluation)
    identity = _identity(wanted, skeletons, prepared)
    _check_folder(wanted)
    with RunLock(wanted.folder) as lock:
        _claim_folder(wanted.folder, identity, lock)
        for part in (wanted.folder, wanted.folder / "runs", wanted.folder / "models"):
            for left in listed(part, f"{SCRATCH_PREFIX}*"):
                delete_folder(left)
        missing = [
            (point, config)
            for point, config in zip(wanted.points, wanted.configs, strict=True)
            if not _done(wanted, point)
        ]
        for _, config in missing:
            # Raises now if a text is too short, or has no responses.
            as_asked(shared(skeletons.of(config), config), config)
        failed = _run(wanted, missing, prepared, shared, lock, executors, progress)
        table, files = _write_results(wanted, lock, plots=True)
    return SweepResult(table, tuple(files), failed)


@dataclass
class SharedTokens:
    """Calibration tokens, cut once for all jobs of a sweep with the same calibration options."""

    cut: dict[tuple[Any, ...], TokenSequences] = field(default_factory=dict)

    def __call__(self, skeleton: Skeleton, config: PruneConfig) -> TokenSequences:
        """The tokens that `cut_tokens` gives for the config."""
        text = (config.dataset, *config.cut_from(), config.calibrate_on)
        key = (*text, config.nsamples, config.seqlen, config.seed)
        if key not in self.cut:
            self.cut[key] = cut_tokens(skeleton, config)
        return self.cut[key]


class _Skeletons:
    """The skeletons of the dense model, one per dtype."""

    def __init__(self, wanted: Sweep) -> None:
        self._source = wanted.source
        self._open: dict[tuple[Any, ...], Skeleton] = {}

    def of(self, config: PruneConfig) -> Skeleton:
        """The skeleton for a config, opened when first needed."""
        key = tuple(how_to_open(config).values())
        if key not in self._open:
            self._open[key] = open_skeleton(self._source, **how_to_open(config))
        return self._open[key]


def _identity(wanted: Sweep, skeletons: _Skeletons, prepared: Prepared) -> dict[str, Any]:
    """What identifies a sweep, as JSON values without local paths: equal for equal sweeps.

    Raises an `InputError` for a run that is not possible, and `ConfigError` where two runs are the
    same job.
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
            **text_identity(evaluation),
            "seqlen": evaluation.seqlen,
            "nsamples": evaluation.nsamples,
            "dtype": evaluation.dtype,
            "attention": prepared.skeleton.attention,
        },
    }


def _require_distinct(points: Sequence[Point], configs: Sequence[PruneConfig]) -> None:
    """Raises `ConfigError` where two runs would compute the same result."""
    seen: dict[str, str] = {}
    for point, config in zip(points, configs, strict=True):
        solver = config.solver_settings(config.method).to_json()
        settings = {**config.what(), **solver}
        if all(each.refine == "none" for each in config.layer_rules().all_settings()):
            settings["refine_steps"] = None
        key = repr(sorted(settings.items()))
        if key in seen:
            raise ConfigError(
                f"the runs {seen[key]} and {point.name} are the same job: the options in which "
                "they differ have no effect (`refine-steps` needs `refine`); leave one out"
            )
        seen[key] = point.name


def _check_folder(wanted: Sweep) -> None:
    """Raises `OutputError` for a folder with files that do not belong to a sweep, or one that
    cannot be written."""
    folder, source = wanted.folder, resolved(wanted.source)
    if lies_in(resolved(folder), source) or lies_in(source, resolved(folder)):
        raise OutputError(f"{folder} and the model lie in one another; name another folder")
    with refusing("the folder", folder, "name another folder"):
        _check_contents(folder)
        longest = max((point.folder for point in wanted.points), key=len)
        left = [part for part in (folder / "runs", folder / "models") if part.exists()]
        for part in (folder, *left):
            try_folder(part, SCRATCH_PREFIX, [f"{longest}/activations/block-000/{'x' * 80}"])


def _check_contents(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; name a folder for the sweep")
    if folder.is_dir() and not (folder / "sweep.json").exists():
        for path in folder.iterdir():
            ours = path.name.startswith(("lock-", SCRATCH_PREFIX)) or is_temporary(path)
            if not ours:
                raise OutputError(
                    f"{folder} is not empty and not the folder of a sweep; name another folder"
                )


def _claim_folder(folder: Path, identity: dict[str, Any], lock: RunLock) -> None:
    """Writes `sweep.json` if missing. Raises `RunDirectoryError` for that of another sweep."""
    path = folder / "sweep.json"
    if path.exists():
        differing = differences(read_json(path, SWEEP_SCHEMA)["sweep"], identity)
        if differing:
            raise RunDirectoryError(
                f"{folder} is the folder of another sweep ({'; '.join(differing[:3])}); name "
                "another folder, or delete it to start again"
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
    """Runs and evaluates the missing runs; returns name -> reason for those that failed."""
    failed: dict[str, str] = {}
    if not missing:
        return failed
    done = len(wanted.points) - len(missing)
    if done:
        progress.note(f"{done} of {len(wanted.points)} runs are already done; resuming")
    evaluation = replace(wanted.evaluation, scratch_dir=str(wanted.folder))
    check_evaluation_space(evaluation, prepared.skeleton, -(-3 * len(prepared.tokens) // 2))
    with _evaluated(prepared, evaluation, executors, progress) as dense:
        payload = {"schema_version": SWEEP_SCHEMA, **dense.metrics()}
        replace_json(wanted.folder / "dense.json", payload, guard=lock.assert_held)
        began = time.monotonic()
        for number, (point, config) in enumerate(missing):
            progress.note(f"run {done + number + 1} of {len(wanted.points)}: {point.name}")
            try:
                metrics = _one(
                    wanted, point, config, shared, evaluation, dense, executors, progress
                )
            except NumericalError as error:
                failed[point.name] = str(error)
                progress.note(f"{point.name}: failed: {error}")
                continue
            write_evaluation(wanted.run(point), metrics, lock.assert_held)
            _write_results(wanted, lock)  # the table so far
            each = (time.monotonic() - began) / (number + 1)
            left = datetime.timedelta(seconds=round(each * (len(missing) - number - 1)))
            progress.note(
                f"{point.name}: perplexity {metrics['perplexity']:.4g}; all done in about {left}"
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
    """Prunes one model, or resumes that, and evaluates it and compares it with the dense model."""
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
    skeleton = open_skeleton(output, **how_to_open(evaluation))
    pruned = replace(dense.prepared, skeleton=skeleton)
    with _evaluated(pruned, evaluation, executors, progress) as other:
        return finite(other.metrics() | {"against_dense": other.against(dense)})


@contextlib.contextmanager
def _evaluated(
    prepared: Prepared, config: EvalConfig, executors: Executors, progress: Progress
) -> Iterator[Evaluated]:
    """`evaluated` on a new executor, which is closed at the end."""
    executor = executors(config)()
    try:
        with evaluated(prepared, config, executor, progress) as evaluation:
            progress.end()
            yield evaluation
    finally:
        progress.end()
        executor.close()


def _discard(wanted: Sweep, point: Point) -> None:
    if not wanted.keep_models:
        delete_folder(wanted.model(point))


def _write_results(
    wanted: Sweep, lock: RunLock, *, plots: bool = False
) -> tuple[Table, list[Path]]:
    """Writes the table of the finished runs, and with `plots` their plots.

    Returns the table and the paths of the files.
    """
    done = [point for point in wanted.points if _done(wanted, point)]
    for point in done:
        # Here, so that a model is also deleted if the sweep was killed after its evaluation.
        _discard(wanted, point)
    summaries = {point.name: read_run_summary(wanted.run(point).path, point.name) for point in done}
    _require_one_model(list(summaries.values()))
    path = wanted.folder / "dense.json"
    dense = read_json(path, SWEEP_SCHEMA) if path.exists() else {}
    table = with_dense(comparison(list(summaries.values())), dense)
    if any(config.executor == "local" for config in wanted.configs):
        table = replace(table, notes=(*table.notes, _LOCAL_NOTE))
    files = write_table(wanted.folder, "sweep", table, lock.assert_held)
    if plots and done:
        drawn = panels(wanted.points, summaries, dense)
        files += draw(wanted.folder, "sweep", wanted.axis, drawn, lock.assert_held)
    return table, files


def _require_one_model(runs: Sequence[RunSummary]) -> None:
    """Raises `RunDirectoryError` if the weights of the source changed between two runs."""
    for run in runs[1:]:
        changed = differences(runs[0].weight_files, run.weight_files)
        if changed:
            raise RunDirectoryError(
                f"the source's weights changed between the runs {runs[0].name} and {run.name} "
                f"({changed[0]}); restore them, and delete the runs made from others"
            )
