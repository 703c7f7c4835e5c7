"""Options as users write them, on the command line or in YAML, and the parser that they share.

Options are made from the config classes, so that each exists once. transformers' parser would do
most of it, but importing it takes longer than a command line may.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from pipeline.config.fields import Declaration, Given, declaration
from storage.errors import ConfigError
from storage.files.names import printable
from storage.files.os_errors import file_errors
from storage.files.small_file import read_small

# What a plain YAML scalar may be besides a string.
_YAML_WORDS = ("bool", "null", "merge")


class Parser(argparse.ArgumentParser):
    """A parser with options of a config class, and one-line complaints."""

    def error(self, message: str) -> NoReturn:
        """Prints the complaint and exits with 2."""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def add_options(parser: argparse.ArgumentParser, config: type[Any]) -> None:
    """Adds an option to `parser` for every field of the dataclass that is declared as one.

    The parser sets those alone that are given: defaults are the config's.
    """
    for name, argument in option_arguments(config).items():
        parser.add_argument(f"--{name.replace('_', '-')}", **argument)


def option_arguments(config: type[Any]) -> dict[str, dict[str, Any]]:
    """Field → what `add_argument` is given for it, of the fields that are declared as options."""
    hints = get_type_hints(config)
    return {
        field.name: _argument(field, declared, hints[field.name])
        for field in dataclasses.fields(config)
        if (declared := declaration(field)) is not None
    }


def _argument(
    field: dataclasses.Field[Any], declared: Declaration, annotation: Any
) -> dict[str, Any]:
    """The arguments of `add_argument` for a field; its type is the annotation without None."""
    text = declared.help_text()
    kinds = [kind for kind in _alternatives(annotation) if kind is not type(None)]
    if field.default is not None and kinds != [bool]:  # else the help says what unset means
        text += f" (default: {field.default})"
    # argparse interpolates percent signs in help texts.
    argument: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
    if kinds == [bool]:
        return argument | {"action": "store_true"}
    if declared.repeated is not None:
        argument |= {"action": _Joined, "const": declared.repeated}
        return argument | {
            "type": functools.partial(path_texts, declared.repeated) if declared.path else str
        }
    if declared.path:
        return argument | {"type": path_text}
    if field.name == "workers":
        return argument | {"type": number_or_auto}
    if declared.choices is not None:
        return argument | {"choices": declared.choices()}
    if get_origin(kinds[0]) is Literal:
        return argument | {"choices": get_args(kinds[0])}
    # An option that is a number or a word is parsed by the config.
    return argument | {"type": str if str in kinds else kinds[0]}


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if union else (annotation,)


class _Joined(argparse.Action):
    """An option that may be given again: all values, with `const` between."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, values if before is None else f"{before}{self.const}{values}")


def number_or_auto(text: str) -> int | None:
    """`--workers`: a number, or `auto`, which is the same as leaving the option out."""
    return None if text == "auto" else int(text)


def path_text(text: str) -> str:
    """A path as the user writes it, with `~` and `~user` expanded: the one place that does so.

    For all paths of the command line and of YAML files, relative ones too; a hub id or a URI, which
    begins with neither, stays as it is. Raises `ArgumentTypeError` for what names no place.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} holds a NUL, which no path may")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text.partition("/")[0]
        raise argparse.ArgumentTypeError(
            f"{text}: there is no home of {user}; write ./{text} for a name that begins with ~"
        )
    return expanded


def path_texts(separator: str, text: str) -> str:
    """`path_text` for each of several paths with `separator` between."""
    return separator.join(path_text(part) for part in text.split(separator))


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

    Raises `ConfigError` where it holds something else, FileError where it cannot be read.
    """
    with file_errors("--config"):
        raw = read_small(path)
    try:
        # The loader makes nothing but strings, booleans, lists and mappings.
        options = yaml.load(raw.decode("utf-8"), _WordLoader)
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"--config {path} is not a YAML file of options ({one_line(error)}); write it anew, "
            "or name another"
        ) from error
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
    """The config object of a parsed command line, with what was given. Raises `ConfigError`."""
    names = {field.name for field in dataclasses.fields(kind)}
    values = {name: value for name, value in vars(options).items() if name in names}
    if issubclass(kind, Given):
        values["given"] = frozenset(values)
    return kind(**values)


def one_line(error: BaseException) -> str:
    """Names in a message may come from a file: nothing of them reaches the terminal as control."""
    words = " ".join([str(error), *getattr(error, "__notes__", ())])
    return printable(" ".join(words.split()) or type(error).__name__)
