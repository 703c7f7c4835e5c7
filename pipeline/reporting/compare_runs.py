"""`prox24 compare`: the settings in which finished jobs differ, and their results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.reporting.run_summary import RunSummary, Scalar, read_run_summary
from pipeline.reporting.tables import Column, Table
from storage.errors import ConfigError
from storage.files.names import printable

SETTINGS = "Settings that differ, and the models"
ERRORS = "Relative error by kind of layer, %"
OBJECTIVES = "Objective by kind of layer"
RECONSTRUCTION = "Reconstruction: held-out error of the blocks' outputs"
COSTS = "Time and memory"

# Comparison with the dense model in `report/evaluation.json`: key, title and format.
_AGAINST_DENSE = (
    ("loss_difference", "loss, nats", "+.4f"),
    ("standard_error", "± of it", ".4f"),
    ("jensen_shannon", "JS, nats", ".4f"),
    ("kullback_leibler", "KL, nats", ".4f"),
    ("same_token", "same top-1", ".4f"),
)
# Key of `pipeline.reconstruct.results.totals`, name, title and format.
_TOTALS = (
    ("before", "output_error before", "before, %", ".4g"),
    ("after", "output_error after", "after, %", ".4g"),
    ("gain", "output_error gain", "gain, %", ".2f"),
    ("blocks", "blocks reconstructed", "blocks", ""),
    ("kept_solved", "blocks kept solved", "kept solved", ""),
    ("not_finite", "blocks not finite", "not finite", ""),
    ("epochs", "epochs", "epochs", ""),
)
_MEMORY = ("driver_rss_bytes", "worker_rss_bytes", "worker_device_bytes")
_STATISTIC_NOTE = (
    "Errors on different statistics are not comparable: `full` uses all second moments of a "
    "layer's inputs, `diagonal` only their diagonal, `none` only the weights."
)
_SOLVE_NOTE = (
    "Errors and objectives of layers are those of the solve, before a reconstruction. Its own "
    "errors are means over blocks and tokens, in percent of the tokens' energy; compare them "
    "between runs with the same targets and text only."
)
_WORLD_NOTE = "Compare the times of runs on different numbers of workers, or machines, with care."


def read_runs(paths: Sequence[Path]) -> list[RunSummary]:
    """The summary of each run directory or OUTPUT, named by its folder, or by its path if needed.

    Raises `ConfigError` where a path is given twice, and errors as `read_run_summary` does.
    """
    names = [printable(path.absolute().name.removesuffix(".run")) for path in paths]
    if len(set(names)) < len(names):
        names = [printable(str(path)) for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{twice} is given twice; name each run once")
    return [read_run_summary(path, name) for path, name in zip(paths, names, strict=True)]


def comparison(runs: Sequence[RunSummary]) -> Table:
    """The table of `runs`, with one row for each."""
    columns = [*_settings(runs), *_model(runs)]
    columns += _by_kind(runs, "relative_error", ERRORS, ".3f")
    columns += _by_kind(runs, "objective", OBJECTIVES, ".4g")
    columns += _reconstruction(runs)
    columns += _costs(runs)
    notes = []
    if len({run.statistic for run in runs}) > 1:
        notes.append(_STATISTIC_NOTE)
    if any(run.reconstruction for run in runs):
        notes.append(_SOLVE_NOTE)
    if len({run.world for run in runs}) > 1:
        notes.append(_WORLD_NOTE)
    return Table(tuple(run.name for run in runs), tuple(columns), tuple(notes))


def _settings(runs: Sequence[RunSummary]) -> list[Column]:
    """The settings that are not equal in all runs; None for a run without that setting."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    columns = []
    for name in names:
        values: tuple[Scalar, ...] = tuple(run.settings.get(name) for run in runs)
        if len({(type(value), value) for value in values}) > 1:
            columns.append(Column(name, name.replace("_", " "), SETTINGS, values, "g"))
    return columns


def _model(runs: Sequence[RunSummary]) -> list[Column]:
    """Perplexity and comparison with the dense model, where the pruned models were evaluated."""
    evaluations = [run.evaluation or {} for run in runs]
    against_dense = [evaluation.get("against_dense") or {} for evaluation in evaluations]
    perplexities = tuple(evaluation.get("perplexity") for evaluation in evaluations)
    columns = [Column("perplexity", "perplexity", SETTINGS, perplexities, ".3f")]
    for key, title, form in _AGAINST_DENSE:
        values = tuple(metrics.get(key) for metrics in against_dense)
        columns.append(Column(key, title, SETTINGS, values, form))
    return columns


def _by_kind(runs: Sequence[RunSummary], what: str, part: str, form: str) -> list[Column]:
    """A metric (an attribute of `KindError`) for all layers, and for each kind of layer."""
    kinds = list(dict.fromkeys(kind for run in runs for kind in run.kinds))
    columns = [Column(what, "all layers", part, tuple(getattr(r.whole, what) for r in runs), form)]
    for kind in kinds:
        values = tuple(getattr(r.kinds[kind], what) if kind in r.kinds else None for r in runs)
        title = kind.rsplit(".", 1)[-1] if _last_names_differ(kinds) else kind
        columns.append(Column(f"{what} {kind}", title, part, values, form))
    if len({run.statistic for run in runs}) > 1:
        columns.append(
            Column(f"{what} statistic", "statistic", part, tuple(r.statistic for r in runs))
        )
    return columns


def _last_names_differ(kinds: Sequence[str]) -> bool:
    """Whether the last parts of the kinds' names, such as `q_proj`, are all different."""
    return len({kind.rsplit(".", 1)[-1] for kind in kinds}) == len(kinds)


def _reconstruction(runs: Sequence[RunSummary]) -> list[Column]:
    """What reconstructions came to; empty where no run has any."""
    results = [run.reconstruction or {} for run in runs]
    return [
        Column(name, title, RECONSTRUCTION, tuple(result.get(key) for result in results), form)
        for key, name, title, form in _TOTALS
        if any(results)
    ]


def _costs(runs: Sequence[RunSummary]) -> list[Column]:
    columns = [Column("seconds", "seconds", COSTS, tuple(run.wall for run in runs), ".1f")]
    for kind in dict.fromkeys(kind for run in runs for kind in run.seconds):
        values = tuple(run.seconds.get(kind) for run in runs)
        columns.append(Column(f"seconds {kind}", kind, COSTS, values, ".1f"))
    columns.append(Column("workers", "workers", COSTS, tuple(run.world for run in runs)))
    for who in _MEMORY:
        peaks = tuple(run.memory.get(who) for run in runs)
        if any(peaks):
            title = who.removesuffix("_bytes").replace("_rss", "").replace("_", " ") + ", MiB"
            values = tuple(None if peak is None else peak / 2**20 for peak in peaks)
            columns.append(Column(who.replace("bytes", "mib"), title, COSTS, values, ".0f"))
    return columns
