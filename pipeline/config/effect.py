"""Options that were given and have no effect: an error, for whoever gave one expects something.

What decides is that an option was written, in the YAML file or on the command line, not its value.
An option declares its conditions beside its help (`fields.Declaration`):

* `unused`: why it has no effect in a config. Settings of the solvers ask the methods, whose files
  say what they read.
* `noted`: in that case it is not refused but noted: the options of the calibration text and of the
  forwards, so that a command stays the same when only its --method changes.
* `of_model`: what a model must have for it ("experts"), which is known when the model is open.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.config.fields import declaration
from storage.errors import ConfigError


def unused_options(config: Any, given: Iterable[str], *, noted: bool = False) -> dict[str, str]:
    """Name → reason, of the given options that have no effect in `config`, in declared order.

    noted: those that are only noted, in place of those that are refused.
    """
    names, reasons = set(given), {}
    for field in dataclasses.fields(config):
        declared = declaration(field)
        if declared is None or declared.unused is None or field.name not in names:
            continue
        reason = declared.unused(config) if declared.is_noted(config) == noted else None
        if reason is not None:
            reasons[field.name] = reason
    return reasons


def refuse_unused(config: Any) -> None:
    """Raises `ConfigError` that names all given options that have no effect, and why."""
    if reasons := unused_options(config, getattr(config, "given", ())):
        raise ConfigError(without_effect(reasons))


def refuse_of_model(config: Any, missing: Mapping[str, str]) -> None:
    """Raises `ConfigError` for given options of what the model lacks.

    missing: what it lacks → a sentence that says so.
    """
    reasons = {
        field.name: missing[declared.of_model]
        for field in dataclasses.fields(config)
        if field.name in config.given
        and (declared := declaration(field)) is not None
        and declared.of_model is not None
        and declared.of_model in missing
    }
    if reasons:
        raise ConfigError(without_effect(reasons))


def without_effect(reasons: Mapping[str, str]) -> str:
    """The message for options without an effect, name → reason: one part for each reason."""
    parts = [
        f"{names} {'has' if count == 1 else 'have'} no effect: {reason}"
        for reason, names, count in _by_reason(reasons)
    ]
    return f"{'; '.join(parts)}; leave {'it' if len(reasons) == 1 else 'them'} out"


def changes_nothing(reasons: Mapping[str, str]) -> str:
    """The note on options that are kept without an effect."""
    return "; ".join(
        f"{names} change{'s' if count == 1 else ''} nothing: {reason}"
        for reason, names, count in _by_reason(reasons)
    )


def _by_reason(reasons: Mapping[str, str]) -> list[tuple[str, str, int]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(f"--{name.replace('_', '-')}")
    return [
        (reason, " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])), len(names))
        for reason, names in grouped.items()
    ]
