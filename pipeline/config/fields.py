"""Declares and checks the options of the command line, as fields of frozen dataclasses.

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
"""A text, or a function that returns it, because the table of methods may still grow."""

Condition = Callable[[Any], str | None]
"""A config -> why an option has no effect in it; None where it may have one."""


@dataclass(frozen=True)
class Declaration:
    """The arguments of `option`.

    placement: the option decides where or how a job runs, not what it computes. It is not part of
    the job's identity, and a resumed job may change it. path: the value is a path on this machine
    (or a hub id or URI, where one may stand for it), in which the command line expands `~`.
    repeated: the option may be given again; its values are joined by this character.
    unused, noted, of_model: see `pipeline.config.effect`.
    """

    help: Text
    placement: bool = False
    choices: Callable[[], Sequence[str]] | None = None
    path: bool = False
    repeated: str | None = None
    unused: Condition | None = None
    noted: bool | Callable[[Any], bool] = False
    of_model: str | None = None

    def is_noted(self, config: Any) -> bool:
        """Whether the option is only noted in `config` where it has no effect."""
        return self.noted(config) if callable(self.noted) else self.noted

    def help_text(self) -> str:
        """The help text: with the unit, and the meaning of an unset option."""
        return self.help if isinstance(self.help, str) else self.help()


def option(default: Any, help: Text, **declared: Any) -> Any:
    """A dataclass field that is an option. help: states the unit. declared: see `Declaration`."""
    return dataclasses.field(default=default, metadata={"option": Declaration(help, **declared)})


def internal(default: Any) -> Any:
    """A dataclass field that is not an option of its command."""
    return dataclasses.field(default=default)


def declaration(field: dataclasses.Field[Any]) -> Declaration | None:
    """The declaration of a field that `option` made; None for any other field."""
    declared: Declaration | None = field.metadata.get("option")
    return declared


def what_it_computes(config: Any) -> dict[str, Any]:
    """The options that a result depends on, by name, as JSON: all but the placement options."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if (declared := declaration(field)) is not None and not declared.placement
    }


@dataclass(frozen=True, kw_only=True)
class Given:
    """Part of a config: the names of the options that the user wrote, whatever their values.

    Empty where a program made the config. Not compared: it changes nothing of a job that runs.
    """

    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)


def values_of(config: Any, kind: type[Any]) -> dict[str, Any]:
    """The values of the fields that `config` has in common with the dataclass `kind`, by name."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(kind)}


def require(config: Any, name: str, *, at_least: float) -> None:
    """Raises `ConfigError` if the option is set and is NaN or below `at_least`."""
    value = getattr(config, name)
    if value is not None and not value >= at_least:
        raise ConfigError(f"--{name.replace('_', '-')} must be at least {at_least:g}, not {value}")


def number_or_word(
    name: str,
    value: float | str | None,
    kind: type[float] | type[int],
    words: tuple[str, ...],
) -> Any:
    """`value` as None, one of `words` or a number, which it may spell. Raises `ConfigError`."""
    if value is None or value in words or not isinstance(value, str):
        return value
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(
            f"--{name} must be a number or {' or '.join(words)}, not {value!r}"
        ) from None
