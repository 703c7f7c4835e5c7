"""The runs of a sweep: all combinations of the varied options, for each line. Reads no model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from storage.errors import ConfigError

_KEYS = ("model", "folder", "prune", "eval", "lines", "vary", "keep-models")
# Options that the sweep sets for its jobs, or that would make all jobs write the same file.
_SET_BY_SWEEP = (
    "run-dir", "overwrite", "eval-dataset", "eval-nsamples", "trace", "config", "save-layers",
)  # fmt: skip
_EVAL_SET_BY_SWEEP = ("json", "scratch-dir", "trace", "config")
# Options that say nothing of a job: they are given on the command line.
_OF_THE_COMMAND = ("debug",)
# A sweep measures perplexity, and compares the runs by it.
_OF_TASKS = ("tasks", "tasks-folder", "num-fewshot")
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Point:
    """One job of a sweep.

    name: in the table. folder: its name on disk. line: the line of the plots that it is a point of.
    x: its value on the horizontal axis, as written. options: those of `prox24 prune`, as written.
    sections: option -> the part of the file that it stands in: `prune`, `vary` or `lines: NAME`.
    """

    name: str
    folder: str
    line: str
    x: str
    options: dict[str, Any]
    sections: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepPlan:
    """A sweep as in its YAML file; options as written, by their names with hyphens.

    axis: the option on the horizontal axis of the plots. evaluation: options of `prox24 eval`.
    keep_models: whether pruned models are kept after their evaluation.
    """

    model: str
    folder: str
    axis: str
    points: tuple[Point, ...]
    evaluation: dict[str, Any]
    keep_models: bool


def read_plan(options: Mapping[str, Any], where: str) -> SweepPlan:
    """The sweep that the mapping of a YAML file describes. where: prefix of error messages.

    Raises `ConfigError` for missing or unknown keys, and for values of the wrong form (see
    docs/sweeps.md).
    """
    given = {_hyphens(key): value for key, value in options.items()}
    for key in given:
        if key not in _KEYS:
            raise ConfigError(f"{where}: {key} is not one of {', '.join(_KEYS)}")
    for key in ("model", "folder", "vary"):
        if not given.get(key):
            raise ConfigError(f"{where}: `{key}` is missing")
    for key in ("model", "folder"):
        if not isinstance(given[key], str):
            raise ConfigError(f"{where}: {key} must be one path or name")
    if given.get("keep-models") not in (None, True, False):
        raise ConfigError(f"{where}: keep-models must be true or false")
    shared = _options(given.get("prune"), f"{where}: prune", _SET_BY_SWEEP)
    lines = {
        str(name): _options(options, f"{where}: lines: {name}", _SET_BY_SWEEP)
        for name, options in _mapping(given.get("lines"), f"{where}: lines").items()
    }
    vary = _vary(given["vary"], f"{where}: vary")
    for option in shared:
        if lines and all(option in own for own in lines.values()):
            raise ConfigError(f"{where}: prune: {option} is in every line too; leave one out")
    for name, fixed in {"prune": shared, **lines}.items():
        for option in fixed.keys() & vary.keys():
            raise ConfigError(f"{where}: {option} is in `vary` and in {name}; leave one out")
    evaluation = _options(given.get("eval"), f"{where}: eval", _EVAL_SET_BY_SWEEP)
    for option in _OF_TASKS:
        if option in evaluation:
            raise ConfigError(
                f"{where}: eval: {option} has no effect: a sweep measures perplexity; leave it out"
            )
    return SweepPlan(
        model=given["model"],
        folder=given["folder"],
        axis=next(iter(vary)),
        points=_points(shared, lines or {"": {}}, vary, where),
        evaluation=evaluation,
        keep_models=bool(given.get("keep-models")),
    )


def _points(
    shared: dict[str, Any], lines: dict[str, dict[str, Any]], vary: dict[str, list[Any]], where: str
) -> tuple[Point, ...]:
    """The points, line by line; the first varied option changes fastest."""
    axis, *others = vary
    points: list[Point] = []
    for name, line_options in lines.items():
        for values in itertools.product(*(vary[option] for option in others)):
            fixed = dict(zip(others, values, strict=True))
            words = [name, *(f"{option}={value}" for option, value in fixed.items())]
            line = " ".join(word for word in words if word)
            for value in vary[axis]:
                label = f"{line} {axis}={value}".strip()
                options = without_steps({**shared, **line_options, **fixed, axis: value})
                sections = {
                    **dict.fromkeys(shared, "prune"),
                    **dict.fromkeys(line_options, f"lines: {name}"),
                    **dict.fromkeys(vary, "vary"),
                }
                points.append(Point(label, folder_name(label), line, str(value), options, sections))
    for what in ("name", "folder"):
        names = [getattr(point, what) for point in points]
        for twice in {name for name in names if names.count(name) > 1}:
            raise ConfigError(
                f"{where}: two runs are called {twice}; give them different lines or values"
            )
    return tuple(points)


def without_steps(options: dict[str, Any]) -> dict[str, Any]:
    """The options, with `refine: none` in place of 0 refinement steps."""
    if str(options.get("refine-steps")) != "0":
        return options
    return {key: value for key, value in options.items() if key != "refine-steps"} | {
        "refine": "none"
    }


def folder_name(label: str) -> str:
    """`label` as the name of a folder, without path separators and characters special to shells."""
    return re.sub(r"[^\w.+=-]+", "_", label).strip("._-")[:_LONGEST_NAME] or "run"


def _vary(value: object, where: str) -> dict[str, list[Any]]:
    vary: dict[str, list[Any]] = {}
    for name, values in _mapping(value, where).items():
        option = _hyphens(name)
        if option in _OF_THE_COMMAND:
            raise ConfigError(f"{where}: {option} has no effect here; give it on the command line")
        if option in _SET_BY_SWEEP:
            raise ConfigError(f"{where}: {option} is set by the sweep; leave it out")
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: {option} must be a list of values")
        for entry in values:
            if entry is None or isinstance(entry, (dict, list)):
                raise ConfigError(f"{where}: {option}: each of its values must be one value")
        vary[option] = values
    return vary


def _options(value: object, where: str, set_by_sweep: tuple[str, ...]) -> dict[str, Any]:
    options = {_hyphens(name): given for name, given in _mapping(value, where).items()}
    for name in options:
        if name in _OF_THE_COMMAND:
            raise ConfigError(f"{where}: {name} has no effect here; give it on the command line")
        if name in set_by_sweep:
            raise ConfigError(f"{where}: {name} is set by the sweep; leave it out")
    return options


def _mapping(value: object, where: str) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a mapping of names to values")
    return value


def _hyphens(name: object) -> str:
    return str(name).replace("_", "-")
