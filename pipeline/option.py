"""How an option of the command line is declared and checked, in a frozen dataclass."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from storage.errors import ConfigError


def option(default: Any, help: str) -> Any:
    """A documented field. `help` ends up in `--help` and states the unit."""
    # argparse interpolates percent signs in help texts.
    return field(default=default, metadata={"help": help.replace("%", "%%")})


def require(config: Any, name: str, *, at_least: float) -> None:
    """Raises `ConfigError` where the option is set and below `at_least` (NaN included)."""
    value = getattr(config, name)
    if value is not None and not value >= at_least:
        raise ConfigError(f"--{name.replace('_', '-')} must be at least {at_least:g}, not {value}")
