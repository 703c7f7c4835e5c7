"""Options as users write them, on the command line or in YAML, and the parser that they share.

transformers' HfArgumentParser makes the options from the dataclasses, so that each exists once.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from storage.errors import ConfigError

# What a plain YAML scalar may be besides a string.
_YAML_WORDS = ("bool", "null", "merge")


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
        if names == ("--override",):
            options["action"] = _Joined
        action: argparse.Action = super().add_argument(*names, **options)
        return action

    def error(self, message: str) -> NoReturn:
        """Prints the complaint and exits with 2."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


class _Joined(argparse.Action):
    """An option that may be given again: all values, with `;` between."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is None else f"{before};{values}")


def number_or_auto(text: str) -> int | None:
    """`--workers`: a number, or `auto`, which is the same as leaving the option out."""
    return None if text == "auto" else int(text)


class _WordLoader(yaml.SafeLoader):
    """Leaves numbers as they are written: to YAML 1.1 `2:4` is 124, in base 60."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuses a name that stands twice, of which YAML would silently take the last."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in {name for name in names if names.count(name) > 1}:
            raise yaml.constructor.ConstructorError(problem=f"{name} stands twice")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_WordLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag.rpartition(":")[2] in _YAML_WORDS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file: strings, booleans, None, lists and mappings of them.

    Raises `ConfigError` where it cannot be read or holds something else.
    """
    try:
        # The loader makes nothing but strings, booleans, lists and mappings.
        options = yaml.load(path.read_text(encoding="utf-8"), _WordLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {path} cannot be read: {one_line(error)}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"--config {path} must hold one mapping of option names to values")
    return options


def as_arguments(options: Mapping[str, Any], where: str) -> list[str]:
    """Options by name as command-line arguments; `where` begins the message of `ConfigError`."""
    arguments = []
    for name, value in options.items():
        if isinstance(value, (dict, list)):
            raise ConfigError(f"{where}: {name} must be one value")
        if value is True:
            arguments.append(f"--{str(name).replace('_', '-')}")
        elif value is not None and value is not False:
            arguments.append(f"--{str(name).replace('_', '-')}={value}")
    return arguments


def config_from(options: argparse.Namespace, kind: type[Any]) -> Any:
    """The config object of a parsed command line. Raises `ConfigError`."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in vars(options).items() if name in names})


def one_line(error: BaseException) -> str:
    """Names in a message may come from a file: nothing of them reaches the terminal as control."""
    words = " ".join([str(error), *getattr(error, "__notes__", ())])
    text = " ".join(words.split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)
