"""How an option of the command line is declared and checked, in a frozen dataclass.

A field made by `option` is an option: the command line, the YAML file, `docs/options.md` and the
job's records are generated from it. Any other field is internal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from storage.errors import ConfigError

Text = str | Callable[[], str]
"""A text, or what makes it when it is asked for: the table of methods may have grown by then."""


@dataclass(frozen=True)
class Declaration:
    """What `option` was given. `placement`: it says where or how a job runs, not what it computes:
    it is no part of a job's identity, and a resumed job may change it."""

    help: Text
    placement: bool
    choices: Callable[[], Sequence[str]] | None

    def help_text(self) -> str:
        """The help text, with the unit and what unset means."""
        return self.help if isinstance(self.help, str) else self.help()


def option(
    default: Any,
    help: Text,
    *,
    placement: bool = False,
    choices: Callable[[], Sequence[str]] | None = None,
) -> Any:
    """A field that is an option: its default, and the help text, which states the unit.

    choices: the values it may have, where its type does not say so.
    """
    return dataclasses.field(
        default=default, metadata={"option": Declaration(help, placement, choices)}
    )


def internal(default: Any) -> Any:
    """A field of a config that is no option of its command."""
    return dataclasses.field(default=default)


def declaration(field: dataclasses.Field[Any]) -> Declaration | None:
    """What `option` was given for a field; None for a field that is no option."""
    declared: Declaration | None = field.metadata.get("option")
    return declared


def what_it_computes(config: Any) -> dict[str, Any]:
    """The options that decide a result, by name, as JSON: those that are not placement."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if (declared := declaration(field)) is not None and not declared.placement
    }


def values_of(config: Any, kind: type[Any]) -> dict[str, Any]:
    """The values of the fields that `config` has in common with the dataclass `kind`, by name."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(kind)}


def require(config: Any, name: str, *, at_least: float) -> None:
    """Raises `ConfigError` where the option is set and below `at_least` (NaN included)."""
    value = getattr(config, name)
    if value is not None and not value >= at_least:
        raise ConfigError(f"--{name.replace('_', '-')} must be at least {at_least:g}, not {value}")


def number_or_word(
    name: str,
    value: float | str | None,
    kind: type[float] | type[int],
    words: tuple[str, ...],
) -> Any:
    """`None`, one of `words`, or the number that `value` is or spells; else `ConfigError`."""
    if value is None or value in words or not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(
            f"--{name} must be a number or {' or '.join(words)}, not {value!r}"
        ) from None
