"""The command line of `prox24`: its commands, their parser, errors in one line, and signals.

A command is a module of `cluster.commands` that exports a `Command`; `COMMANDS` lists them. The
options themselves are made by `cluster.options`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cluster.command import Command
from cluster.options import (
    Parser,
    add_options,
    as_arguments,
    config_from,
    one_line,
    path_text,
    read_yaml,
)
from cluster.terminal import OutputClosed, checked_stdout, terminal
from pipeline.config.effect import changes_nothing, refuse_unused, unused_options
from storage.errors import Prox24Error, RunInterrupted
from storage.files.names import shell_line
from storage.files.os_errors import file_error

COMMANDS = {
    "prune": "cluster.commands.prune",
    "eval": "cluster.commands.evaluate",
    "solve": "cluster.commands.solve",
    "status": "cluster.commands.status",
    "report": "cluster.commands.report",
    "verify": "cluster.commands.verify",
    "compare": "cluster.commands.compare",
    "sweep": "cluster.commands.sweep",
    "plan": "cluster.commands.plan",
    "bench": "cluster.commands.bench",
    "doctor": "cluster.commands.doctor",
    "demo": "cluster.commands.demo",
}
"""Name → module, in the order of the help. A command's module is imported when it is named."""


def command_named(name: str) -> Command:
    """The command that `name`, a key of `COMMANDS`, stands for."""
    command: Command = importlib.import_module(COMMANDS[name]).COMMAND
    return command


def make_parser(names: Iterable[str] | None = None) -> argparse.ArgumentParser:
    """The parser of the whole command line, or of the commands `names` alone."""
    parser = argparse.ArgumentParser(
        prog="prox24", description="Prunes causal language models of any size to 2:4 sparsity."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=Parser, metavar="COMMAND", title="commands"
    )
    for name in COMMANDS if names is None else names:
        _add(commands, command_named(name))
    return parser


def _add(commands: Any, command: Command) -> None:
    parser: Parser = commands.add_parser(
        command.name,
        help=command.help,
        description=command.description or f"{command.help[0].upper()}{command.help[1:]}.",
        epilog=command.epilog,
        allow_abbrev=False,
    )
    if command.config is not None:
        add_options(parser, command.config)
        parser.add_argument(
            "--config",
            type=path_text,
            help="YAML file with any of these options; the command line wins over it",
        )
    if command.arguments is not None:
        command.arguments(parser)
    if command.config is None:
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def run(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    options: argparse.Namespace | None = None
    _print_anything()
    try:
        options = parse(arguments)
        _set_up_logging(getattr(options, "verbose", False))
        with _signals(), checked_stdout():
            command = command_named(options.command)
            if command.config is not None:
                _check_given(config_from(options, command.config))
            return command.run(options)
    except SystemExit as exit:
        return int(exit.code or 0)
    except KeyboardInterrupt as signalled:
        return _interrupted(RunInterrupted(str(signalled) or "SIGINT"), arguments)
    except OutputClosed:
        return OutputClosed.exit_code
    except Exception as error:
        if options is not None and getattr(options, "debug", False):
            raise
        return _failed(error)


def _failed(error: Exception) -> int:
    """Prints an error on one line; returns the exit status."""
    told = error if isinstance(error, Prox24Error) else file_error(error)
    if told is not None:
        print(f"prox24: {one_line(told)}", file=sys.stderr)
        return told.exit_code
    print(
        f"prox24: unexpected {type(error).__name__}: {one_line(error)} (--debug shows where; "
        "please report it)",
        file=sys.stderr,
    )
    return 1


def _check_given(config: Any) -> None:
    """Raises `ConfigError` for options that have no effect; prints a line for harmless ones."""
    refuse_unused(config)
    if reasons := unused_options(config, getattr(config, "given", ()), noted=True):
        terminal().print(f"note: {changes_nothing(reasons)}", markup=False, soft_wrap=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parses the command line, with the YAML file's options put before it.

    Raises `ConfigError` for a file that is not a mapping of options.
    """
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        return make_parser().parse_args(arguments)
    if command_named(name).config is not None:
        arguments = _with_file(arguments)
    return make_parser([name]).parse_args(arguments)


def _with_file(arguments: Sequence[str]) -> Sequence[str]:
    """The arguments with the options of the YAML file in `--config` after the command's name."""
    parser = Parser(prog=f"prox24 {arguments[0]}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=path_text)
    known, _ = parser.parse_known_args(arguments)
    if known.config is None:
        return arguments
    path = Path(known.config)
    return [arguments[0], *as_arguments(read_yaml(path), f"--config {path}"), *arguments[1:]]


def _print_anything() -> None:
    """What the terminal's encoding lacks is printed as an escape; it is no reason to fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _set_up_logging(verbose: bool) -> None:
    # Ray leaves out lines that differ only in numbers, such as the rank. Read when it is imported.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    if not verbose:
        _quieten_libraries()


def _quieten_libraries() -> None:
    """No warnings and no bars of libraries, which read this when they are imported, later."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # transformers follows the hub's client in this. The client's own environment variable would
    # also forbid the bars of a download, which `cluster.source` allows.
    disable_progress_bars()


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
    if arguments and arguments[0] in COMMANDS and (kept := command_named(arguments[0]).resumes):
        print(
            f"prox24: {kept} are kept; go on with: prox24 {shell_line(arguments)}",
            file=sys.stderr,
        )
    return error.exit_code
