"""What a command of `prox24` is: its help, its options, and what it does with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command: its module exports it as `COMMAND`, and `cluster.command_line` lists the module.

    name: what is typed after `prox24`. help: its line in `prox24 --help`. run: does the work with
    the parsed options, and returns the exit status. description: the text above the options in its
    help; None: `help` as a sentence. epilog: the text below them. config: the config class whose
    fields are its options; such a command also reads them from a YAML file, `--config`. A command
    without one gets `--debug` alone. arguments: adds what else it takes: positional arguments, and
    options without a config class. resumes: what is kept when it is interrupted, where running the
    same command again continues from there.

    A module of a command is imported for `prox24 --help`, so it imports torch, transformers, Ray
    and pyarrow only inside `run`, after the checks that need none of them.
    """

    name: str
    help: str
    run: Callable[[argparse.Namespace], int]
    description: str | None = None
    epilog: str | None = None
    config: type[Any] | None = None
    arguments: Callable[[argparse.ArgumentParser], None] | None = None
    resumes: str | None = None
