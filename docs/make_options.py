"""Writes `docs/options.md` from the config classes: `make docs`. A test fails where it is stale."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cluster.command_line import COMMANDS, command_named  # noqa: E402
from cluster.options import option_arguments  # noqa: E402
from pipeline.config.fields import Declaration, declaration  # noqa: E402
from pipeline.config.methods import METHODS, method_facts  # noqa: E402

HEAD = """\
<!-- Written by docs/make_options.py (`make docs`) from the config classes. Do not edit. -->

# Options

Every command takes its options on the command line, and most also from a YAML file, `--config
job.yaml`, where they are written without the dashes (`nsamples: 64`); the command line wins. A flag
is `true` or `false` there.

"Same job" says whether an option may differ when a job is resumed: options that decide the result
must be the same, the others say where and how it runs.
"""


def options_page() -> str:
    """The page as text."""
    parts = [HEAD, _methods()]
    for name in COMMANDS:
        command = command_named(name)
        if command.config is not None:
            parts.append(_section(name, command.help, command.config))
    return "\n".join(parts)


def _methods() -> str:
    rows = ["## Methods' defaults", "", "| method | how | damping | shrinkage | refine | steps |"]
    rows.append("| --- | --- | --- | --- | --- | --- |")
    for name in METHODS:
        facts = method_facts(name)
        steps = facts.refine_steps if facts.refine_steps is not None else "by `--refine`"
        steps = "" if facts.refine == "none" else steps
        cells = (f"`{name}`", facts.help, facts.damping, facts.shrinkage, facts.refine, steps)
        rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join([*rows, ""])


def _section(name: str, help: str, config: type[Any]) -> str:
    job = name == "prune"
    head = ["option", "default", *(["same job"] if job else []), "meaning"]
    rows = [f"## prox24 {name}", "", f"{help[0].upper()}{help[1:]}.", "", _row(head)]
    rows.append(_row(["---"] * len(head)))
    arguments = option_arguments(config)
    for field in dataclasses.fields(config):
        declared = declaration(field)
        if declared is not None:
            rows.append(_row(_option(field, declared, arguments[field.name], job)))
    return "\n".join([*rows, ""])


def _option(
    field: dataclasses.Field[Any], declared: Declaration, argument: dict[str, Any], job: bool
) -> list[str]:
    choices = argument.get("choices")
    values = "" if choices is None else f" One of {', '.join(f'`{c}`' for c in choices)}."
    default = "off" if argument.get("action") == "store_true" else field.default
    default = "" if default is None else f"`{default}`"
    same = [("may differ" if declared.placement else "must be the same")] if job else []
    text = declared.help_text()
    return [
        f"`--{field.name.replace('_', '-')}`",
        default,
        *same,
        f"{text[0].upper()}{text[1:]}.{values}",
    ]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    (ROOT / "docs" / "options.md").write_text(options_page(), encoding="utf-8")
