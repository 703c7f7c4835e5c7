"""The commands of `prox24`: options generated from the config classes, errors in one line.

The options themselves are made by `cluster.options`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers.utils import logging as transformers_logging

from cluster.commands.compare import DESCRIPTION as compare_description
from cluster.commands.compare import add_arguments as add_compare_arguments
from cluster.commands.compare import compare_command
from cluster.commands.report import DESCRIPTION as report_description
from cluster.commands.report import add_arguments as add_report_arguments
from cluster.commands.report import report_command
from cluster.commands.status import DESCRIPTION, add_arguments, show
from cluster.commands.sweep import DESCRIPTION as sweep_description
from cluster.commands.sweep import add_arguments as add_sweep_arguments
from cluster.commands.sweep import sweep_command
from cluster.commands.verify import DESCRIPTION as verify_description
from cluster.commands.verify import add_arguments as add_verify_arguments
from cluster.commands.verify import verify_command
from cluster.console import Console, comparison_table, provenance, solve_table
from cluster.options import (
    HelpFormatter,
    Parser,
    add_options,
    as_arguments,
    config_from,
    one_line,
    read_yaml,
)
from cluster.source import resolve_model
from pipeline.config.evaluate import EvalConfig
from pipeline.config.prune import PruneConfig
from pipeline.config.runtime import RuntimeConfig
from pipeline.config.solve import SolveConfig
from pipeline.loop.executor import Executor
from pipeline.planning.options import PlanConfig
from pipeline.runtime.progress import Progress
from pipeline.speed.options import BenchConfig
from pipeline.worker.local_executor import LocalExecutor
from storage.errors import ConfigError, Prox24Error, RunInterrupted
from storage.model.folder import Source
from storage.object_store import place

_PRUNE_EPILOG = """\
Run the same command again to go on with a job that was interrupted: it continues at the last
committed block and ends with the same bytes."""


_MODEL = "local Hugging Face folder, s3:// or gs:// URI of one, or hub id"

_PLAN_EPILOG = """\
Reads the config and the headers of the weight files, no weights. Exit status 3: the job would not
fit."""

_BENCH_EPILOG = """\
Reads the config, no weights. Exit status 3: there is no GPU here that multiplies 2:4 weights."""


_DEMO = (
    "Prune SmolLM2-135M-Instruct on a Ray of its own, by magnitude and by prox_admm, and compare "
    "perplexities. The model comes as a Python package, so that a package index is all it needs."
)

# Commands without a job's options: name, help, description, what adds their arguments.
_PLAIN_COMMANDS: tuple[tuple[str, str, str, Callable[[Any], None]], ...] = (
    ("status", "show how far a job is, from its run directory", DESCRIPTION, add_arguments),
    ("report", "make a finished job's report again", report_description, add_report_arguments),
    ("verify", "hold a pruned model against its source", verify_description, add_verify_arguments),
    (
        "compare",
        "compare finished jobs by their run directories",
        compare_description,
        add_compare_arguments,
    ),
    ("sweep", "prune with many settings, and compare them", sweep_description, add_sweep_arguments),
)


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="prox24", description="Prunes causal language models of any size to 2:4 sparsity."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=Parser, metavar="COMMAND", title="commands"
    )
    prune = _command(commands, "prune", PruneConfig, "prune MODEL into the new folder OUTPUT")
    prune.epilog = _PRUNE_EPILOG
    prune.add_argument("model", metavar="MODEL", help=_MODEL)
    prune.add_argument("output", metavar="OUTPUT", help="folder for the pruned model, or URI")
    evaluate = _command(commands, "eval", EvalConfig, "measure perplexities, and compare models")
    evaluate.add_argument(
        "models", nargs="+", metavar="MODEL",
        help=f"{_MODEL}; of several, each is held against the first: "
        "paired difference of the loss, divergence, and share of equal most likely tokens",
    )  # fmt: skip
    solve = _command(commands, "solve", SolveConfig, "replay solvers on one saved layer")
    solve.add_argument(
        "layer",
        metavar="LAYER",
        help=".safetensors file with `weight` (R, C) and `inputs` (sequences, tokens, C), or with "
        "`hessian` (C, C), the sum of x xᵀ over the `tokens` that its metadata states",
    )
    _add_plain_commands(commands)
    plan = _command(commands, "plan", PlanConfig, "say what pruning MODEL will take")
    plan.epilog = _PLAN_EPILOG
    plan.add_argument("model", metavar="MODEL", help=f"{_MODEL}, or a config.json alone")
    bench = _command(commands, "bench", BenchConfig, "time a model's 2:4 products on this GPU")
    bench.epilog = _BENCH_EPILOG
    bench.add_argument("model", metavar="MODEL", help=f"{_MODEL}, or a config.json alone")
    demo = commands.add_parser(
        "demo", help="prune a small real model on this machine", description=_DEMO,
        allow_abbrev=False, formatter_class=HelpFormatter,
    )  # fmt: skip
    demo.add_argument("--folder", default="demo", help="where models and texts go")
    demo.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_plain_commands(commands: Any) -> None:
    for name, help, description, add in _PLAIN_COMMANDS:
        parser = commands.add_parser(
            name, help=help, description=description, allow_abbrev=False,
            formatter_class=HelpFormatter,
        )  # fmt: skip
        add(parser)


def _command(commands: Any, name: str, config: type[Any], help: str) -> Parser:
    parser: Parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    add_options(parser, config)
    parser.add_argument(
        "--config", help="YAML file with any of these options; the command line wins over it"
    )
    return parser


def run(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    options: argparse.Namespace | None = None
    try:
        options = parse(arguments)
        _set_up_logging(getattr(options, "verbose", False))
        with _signals():
            command: Callable[[argparse.Namespace], int] = {
                "prune": _prune,
                "eval": _evaluate,
                "solve": _solve,
                "status": show,
                "report": report_command,
                "verify": verify_command,
                "compare": compare_command,
                "sweep": _sweep,
                "plan": _plan,
                "bench": _bench,
                "demo": _demo,
            }[options.command]
            return command(options)
    except SystemExit as exit:
        return int(exit.code or 0)
    except KeyboardInterrupt as signalled:
        return _interrupted(RunInterrupted(str(signalled) or "SIGINT"), arguments)
    except Exception as error:
        if options is not None and options.debug:
            raise
        expected = isinstance(error, Prox24Error)
        name = "" if expected else f"unexpected {type(error).__name__}: "
        hint = "" if expected else " (--debug shows where; please report it)"
        print(f"prox24: {name}{one_line(error)}{hint}", file=sys.stderr)
        return error.exit_code if isinstance(error, Prox24Error) else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, with the YAML file's options put before it.

    Raises `ConfigError` for a file that is not a mapping of options.
    """
    parser = make_parser()
    known, _ = _config_option().parse_known_args(arguments)
    if known.config is not None and arguments and arguments[0] != "sweep":
        path = Path(known.config)
        written = as_arguments(read_yaml(path), f"--config {path}")
        arguments = [arguments[0], *written, *arguments[1:]]
    return parser.parse_args(arguments)


def _config_option() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def make_executor(config: RuntimeConfig, console: Console) -> Callable[[], Executor]:
    """The executor that the config asks for, made when called. Ray is imported only for Ray."""

    def make() -> Executor:
        if config.executor == "local":
            world = config.workers or 1
            cores = len(os.sched_getaffinity(0))
            return LocalExecutor(world, config.threads or max(1, cores // world))
        from cluster.dispatch.ray_executor import RayExecutor

        return RayExecutor(config, console.note)

    return make


def _seen_by_prometheus(console: Console, config: RuntimeConfig, run: str) -> Progress:
    """The console, behind metrics where the job runs on Ray."""
    if config.executor != "ray":
        return console
    from cluster.dispatch.metered import MeteredProgress

    return MeteredProgress(console, run)


def _prune(options: argparse.Namespace) -> int:
    from pipeline.prune import prune, run_directory_of

    config: PruneConfig = config_from(options, PruneConfig)
    console = Console()
    source = resolve_model(options.model)
    console.settings(options.model, options.output, config)
    output = place(options.output)
    result = prune(
        source.folder,
        output,
        config,
        make_executor(config, console),
        _seen_by_prometheus(console, config, run_directory_of(output, config).name),
        source_name=source.name,
    )
    console.result(result)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from pipeline.evaluation.perplexity import compare, evaluate

    config: EvalConfig = config_from(options, EvalConfig)
    sources = [resolve_model(model) for model in options.models]
    console = Console()
    executor = make_executor(config, console)
    if config.tasks is not None:
        return _tasks(sources, config, executor, console)
    if len(sources) > 1:
        results = compare([source.folder for source in sources], config, executor, console)
        named = [
            {"model": source.name, **result}
            for source, result in zip(sources, results, strict=True)
        ]
        print(
            json.dumps({"models": named}) if config.json else comparison_table(named).rstrip("\n")
        )
        return 0
    measured = evaluate(sources[0].folder, config, executor, console)
    if config.json:
        print(json.dumps({"model": sources[0].name, **measured}))
    else:
        print(
            f"perplexity {measured['perplexity']:.4f} on {measured['dataset']} "
            f"({measured['nsamples']} x {measured['seqlen']} tokens, {measured['dtype']})\n"
            + provenance(measured)
        )
    return 0


def _tasks(
    sources: Sequence[Source],
    config: EvalConfig,
    make_executor: Callable[[], Executor],
    console: Console,
) -> int:
    try:
        from cluster.commands.tasks import tasks_command
    except ModuleNotFoundError as error:
        raise ConfigError(f"--tasks needs lm-eval ({error}): pip install prox24[tasks]") from error
    return tasks_command(sources, config, make_executor, console)


def _solve(options: argparse.Namespace) -> int:
    from pipeline.solve_layer import solve_layer

    config: SolveConfig = config_from(options, SolveConfig)
    results = solve_layer(Path(options.layer), config)
    if config.json:
        print(json.dumps(results))
    else:
        print(solve_table(results), end="")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    return sweep_command(options, make_executor)


def _plan(options: argparse.Namespace) -> int:
    from cluster.commands.plan import plan_command

    config: PlanConfig = config_from(options, PlanConfig)
    return plan_command(options.model, config)


def _bench(options: argparse.Namespace) -> int:
    from cluster.commands.bench import bench_command

    return bench_command(options.model, config_from(options, BenchConfig))


def _demo(options: argparse.Namespace) -> int:
    from cluster.commands.demo import demo

    return demo(Path(options.folder))


def _set_up_logging(verbose: bool) -> None:
    # Ray leaves out lines that differ only in numbers, such as the rank. Read when it is imported.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    if not verbose:
        # Read when `datasets` is imported, which only texts of the hub need.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that workers are stopped and the lock is released."""

    def stop(number: int, _: Any) -> NoReturn:
        # A second signal must not break off the unwinding.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # What libraries let pass, and a handler of `Exception` does not take for its own error.
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, stop)
    before_interrupt = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, before_interrupt)


def _interrupted(error: RunInterrupted, arguments: Sequence[str]) -> int:
    print(f"prox24: stopped by {error}", file=sys.stderr)
    kept = {"prune": "finished blocks", "sweep": "finished runs and blocks"}
    if arguments and arguments[0] in kept:
        print(
            f"prox24: {kept[arguments[0]]} are kept; go on with: prox24 {shlex.join(arguments)}",
            file=sys.stderr,
        )
    return error.exit_code
