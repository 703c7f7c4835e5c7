"""The commands of `prox24`: options generated from the config classes, errors in one line.

transformers' HfArgumentParser makes the options from the dataclasses, so that each exists once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from cluster.console import Console, comparison_table, solve_table
from cluster.source import resolve_model
from cluster.status import DESCRIPTION, add_arguments, show
from cluster.verify import DESCRIPTION as verify_description
from cluster.verify import add_arguments as add_verify_arguments
from cluster.verify import verify_command
from pipeline.config import EvalConfig, PruneConfig, RuntimeConfig, SolveConfig
from pipeline.executor import Executor, LocalExecutor
from pipeline.planning.options import PlanConfig
from pipeline.progress import Progress
from storage.errors import ConfigError, Prox24Error, RunInterrupted
from storage.object_store import place

# What a plain YAML scalar may be besides a string.
_YAML_WORDS = ("bool", "null", "merge")

_PRUNE_EPILOG = """\
Run the same command again to go on with a job that was interrupted: it continues at the last
committed block and ends with the same bytes."""


_MODEL = "local Hugging Face folder, s3:// or gs:// URI of one, or hub id"

_PLAN_EPILOG = """\
Reads the config and the headers of the weight files, no weights. Exit status 3: the job would not
fit."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """States defaults, but not that of an option whose help says what unset means."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.const is True:
            return action.help
        return super()._get_help_string(action)


class Parser(HfArgumentParser):
    """HfArgumentParser with one spelling per option, plain flags, and one-line complaints."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Drops the spelling with underscores; makes an option that is False by default a flag."""
        names = tuple(n for n in names if "_" not in n or not n.startswith("--"))
        if options.get("const") is True and options.get("default") is False:
            options = {"action": "store_true", "help": options["help"]}
        if names == ("--workers",):
            options["type"] = number_or_auto
        action: argparse.Action = super().add_argument(*names, **options)
        return action

    def error(self, message: str) -> NoReturn:
        """Prints the complaint and exits with 2."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def number_or_auto(text: str) -> int | None:
    """`--workers`: a number, or `auto`, which is the same as leaving the option out."""
    return None if text == "auto" else int(text)


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="prox24", description="Prunes causal language models of any size to 2:4 sparsity."
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
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
    status = commands.add_parser(
        "status", help="show how far a job is, from its run directory", description=DESCRIPTION,
        allow_abbrev=False, dataclass_types=[],
    )  # fmt: skip
    add_arguments(status)
    verify = commands.add_parser(
        "verify", help="hold a pruned model against its source",
        description=verify_description, allow_abbrev=False, dataclass_types=[],
    )  # fmt: skip
    add_verify_arguments(verify)
    plan = _command(commands, "plan", PlanConfig, "say what pruning MODEL will take")
    plan.epilog = _PLAN_EPILOG
    plan.add_argument("model", metavar="MODEL", help=f"{_MODEL}, or a config.json alone")
    demo = commands.add_parser(
        "demo", help="prune a small real model on this machine", allow_abbrev=False,
        dataclass_types=[],
    )  # fmt: skip
    demo.add_argument("--folder", default="demo", help="where models and texts go (default: demo)")
    demo.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _command(commands: Any, name: str, config: type[Any], help: str) -> Parser:
    parser: Parser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        dataclass_types=config,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
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
                "verify": verify_command,
                "plan": _plan,
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
        print(f"prox24: {name}{_one_line(error)}{hint}", file=sys.stderr)
        return error.exit_code if isinstance(error, Prox24Error) else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, with the YAML file's options put before it.

    Raises `ConfigError` for a file that is not a mapping of options.
    """
    parser = make_parser()
    known, _ = _config_option().parse_known_args(arguments)
    if known.config is not None and arguments:
        arguments = [arguments[0], *_yaml_arguments(Path(known.config)), *arguments[1:]]
    return parser.parse_args(arguments)


def _config_option() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


class _WordLoader(yaml.SafeLoader):
    """Leaves numbers as they are written: to YAML 1.1 `2:4` is 124, in base 60."""


_WordLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag.rpartition(":")[2] in _YAML_WORDS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _yaml_arguments(path: Path) -> list[str]:
    try:
        # The loader makes nothing but strings, booleans, lists and mappings.
        options = yaml.load(path.read_text(encoding="utf-8"), _WordLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {_one_line(error)}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"--config {path} must hold one mapping of option names to values")
    arguments = []
    for name, value in options.items():
        if isinstance(value, (dict, list)):
            raise ConfigError(f"--config {path}: {name} must be one value")
        if value is True:
            arguments.append(f"--{str(name).replace('_', '-')}")
        elif value is not None and value is not False:
            arguments.append(f"--{str(name).replace('_', '-')}={value}")
    return arguments


def config_from(options: argparse.Namespace, kind: type[Any]) -> Any:
    """The config object of a parsed command line. Raises `ConfigError`."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in vars(options).items() if name in names})


def make_executor(config: RuntimeConfig, console: Console) -> Callable[[], Executor]:
    """The executor that the config asks for, made when called. Ray is imported only for Ray."""

    def make() -> Executor:
        if config.executor == "local":
            world = config.workers or 1
            cores = len(os.sched_getaffinity(0))
            return LocalExecutor(world, config.threads or max(1, cores // world))
        from cluster.ray_executor import RayExecutor

        return RayExecutor(config, console.note)

    return make


def _seen_by_prometheus(console: Console, config: RuntimeConfig, run: str) -> Progress:
    """The console, behind metrics where the job runs on Ray."""
    if config.executor != "ray":
        return console
    from cluster.metered import MeteredProgress

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
    from pipeline.evaluate import compare, evaluate

    config: EvalConfig = config_from(options, EvalConfig)
    sources = [resolve_model(model) for model in options.models]
    console = Console()
    executor = make_executor(config, console)
    if len(sources) > 1:
        results = compare([source.folder for source in sources], config, executor, console)
        named = [
            {"model": source.name, **result}
            for source, result in zip(sources, results, strict=True)
        ]
        print(json.dumps({"models": named}) if config.json else comparison_table(named))
        return 0
    measured = evaluate(sources[0].folder, config, executor, console)
    if config.json:
        print(json.dumps({"model": sources[0].name, **measured}))
    else:
        print(
            f"perplexity {measured['perplexity']:.4f} on {measured['dataset']} "
            f"({measured['nsamples']} x {measured['seqlen']} tokens, {measured['dtype']})"
        )
    return 0


def _solve(options: argparse.Namespace) -> int:
    from pipeline.solve_layer import solve_layer

    config: SolveConfig = config_from(options, SolveConfig)
    results = solve_layer(Path(options.layer), config)
    if config.json:
        print(json.dumps(results))
    else:
        print(solve_table(results))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from cluster.plan import plan_command

    config: PlanConfig = config_from(options, PlanConfig)
    return plan_command(options.model, config)


def _demo(options: argparse.Namespace) -> int:
    from cluster.demo import demo

    return demo(Path(options.folder))


def _set_up_logging(verbose: bool) -> None:
    # Ray leaves out lines that differ only in numbers, such as the rank. Read when it is imported.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    if not verbose:
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
    if arguments and arguments[0] == "prune":
        print(
            f"prox24: finished blocks are kept; go on with: prox24 {shlex.join(arguments)}",
            file=sys.stderr,
        )
    return error.exit_code


def _one_line(error: BaseException) -> str:
    """Names in a message may come from a file: nothing of them reaches the terminal as control."""
    words = " ".join([str(error), *getattr(error, "__notes__", ())])
    text = " ".join(words.split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)
