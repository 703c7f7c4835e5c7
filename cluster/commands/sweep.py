"""`prox24 sweep`: its YAML file as jobs, and what is printed of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cluster.command import Command
from cluster.commands.compare import table_text
from cluster.console import Console
from cluster.dispatch.executors import make_executor
from cluster.options import (
    Parser,
    add_options,
    as_arguments,
    config_from,
    path_text,
    read_yaml,
)
from cluster.source import resolve_model
from pipeline.config.effect import unused_options, without_effect
from pipeline.config.evaluate import EvalConfig
from pipeline.config.prune import PruneConfig
from pipeline.config.runtime import RuntimeConfig
from pipeline.reporting.tables import arrow
from pipeline.sweep.grid import SweepPlan, read_plan
from pipeline.text.files import check_dataset
from storage.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.sweep.run import Sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prox24 sweep`."""
    parser.add_argument(
        "--config", required=True, type=path_text,
        help="YAML file of the sweep: see docs/sweeps.md",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--verbose", action="store_true", help="show debug messages")


def run(options: argparse.Namespace) -> int:
    """Runs the sweep; returns the exit status: 0, or 1 where a run failed."""
    where = f"--config {options.config}"
    wanted = sweep_from(read_plan(read_yaml(Path(options.config)), where), where)
    from pipeline.reporting.compare_runs import SETTINGS
    from pipeline.sweep.run import sweep

    console = _SweepConsole()
    result = sweep(wanted, lambda config: make_executor(config, console), console)
    if options.json:
        print(json.dumps({"runs": arrow(result.table).to_pylist(), "failed": result.failed}))
    else:
        print(table_text(result.table, only=SETTINGS), end="")
    for path in result.files:
        console.print(f"wrote {path}")
    for name, why in result.failed.items():
        print(f"prox24: {name} failed: {why}", file=sys.stderr)
    return 1 if result.failed else 0


def sweep_from(plan: SweepPlan, where: str) -> Sweep:
    """The sweep that a plan asks for. Raises an `InputError` for an option that is wrong."""
    configs = tuple(
        _parsed(PruneConfig, point.options, f"{where}: {point.name}") for point in plan.points
    )
    runtime = {field.name.replace("_", "-") for field in dataclasses.fields(RuntimeConfig)}
    placed = {key: value for key, value in plan.points[0].options.items() if key in runtime}
    evaluation = _parsed(EvalConfig, {**placed, **plan.evaluation}, f"{where}: eval")
    _refuse_unused(plan, configs, evaluation, where)
    for dataset in dict.fromkeys([*(config.dataset for config in configs), evaluation.dataset]):
        check_dataset(dataset)
    source = resolve_model(_path(plan.model, f"{where}: model"))
    from pipeline.sweep.run import Sweep

    return Sweep(
        source=source.folder,
        source_name=source.name,
        folder=Path(_path(plan.folder, f"{where}: folder")).absolute(),
        axis=plan.axis,
        points=plan.points,
        configs=configs,
        evaluation=evaluation,
        keep_models=plan.keep_models,
    )


def _refuse_unused(
    plan: SweepPlan, configs: Sequence[PruneConfig], evaluation: EvalConfig, where: str
) -> None:
    """Raises `ConfigError` for an option that has no effect in any run that its part is for."""
    effects: dict[tuple[str, str], list[str | None]] = {}
    for point, config in zip(plan.points, configs, strict=True):
        unused = unused_options(config, config.given)
        for option in config.given:
            section = point.sections.get(option.replace("_", "-"))
            if section is not None:
                effects.setdefault((section, option), []).append(unused.get(option))
    for (section, option), reasons in effects.items():
        if all(reasons):
            reason = " and ".join(dict.fromkeys(filter(None, reasons)))
            if section == "vary":
                reason += ", so that the runs it makes are the same job"
            raise ConfigError(f"{where}: {section}: {without_effect({option: reason})}")
    given = {option.replace("-", "_") for option in plan.evaluation}
    if reasons_of_eval := unused_options(evaluation, given):
        raise ConfigError(f"{where}: eval: {without_effect(reasons_of_eval)}")


def _path(text: str, where: str) -> str:
    """A path that is no option, with `~` expanded as in those that are."""
    try:
        return path_text(text)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{where}: {error}") from error


class _FileParser(Parser):
    """The parser of a command, for options in a file: what is wrong is raised."""

    def error(self, message: str) -> NoReturn:
        """Raises `ConfigError`."""
        raise ConfigError(f"{self.prog}: {message}")


def _parsed(kind: type[Any], options: Mapping[str, Any], where: str) -> Any:
    """The config of options as written, converted and checked as on the command line."""
    parser = _FileParser(prog=where, allow_abbrev=False, add_help=False)
    add_options(parser, kind)
    try:
        return config_from(parser.parse_args(as_arguments(options, where)), kind)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from error


class _SweepConsole(Console):
    """Without a terminal one line a run is enough, in place of one a block."""

    _lines_of_blocks = False

    def block_done(
        self,
        block: int,
        relative_error: float | None,
        output_error: tuple[float, float] | None = None,
    ) -> None:
        """Moves the bar where there is one."""
        if self.console.is_terminal:
            super().block_done(block, relative_error, output_error)


COMMAND = Command(
    name="sweep",
    help="prune with many settings, and compare them",
    description="Prune a model with many settings, evaluate each, and write a table and plots. The "
    "same command continues with what is missing. Exit status 1 where a run failed.",
    arguments=add_arguments,
    run=run,
    resumes="finished runs and blocks",
)
