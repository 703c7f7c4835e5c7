"""docs/published-forms.md: a row for each form, from what a run made of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import transformers

from tests.support.published_forms.all_forms import FORMS
from tests.support.published_forms.broken import BROKEN
from tests.support.published_forms.form import CLASS, FOUND, KNOWN, PRUNED
from tests.support.published_forms.outcome import TOLERANCE, Outcome

PAGE = Path(__file__).parents[3] / "docs" / "published-forms.md"
_SOURCES = {
    KNOWN: "the repository's `config.json`, as the author of the form knows it; it was not at hand",
    FOUND: "that `config.json`, or its particular keys, as copied in public code",
    CLASS: "the defaults and docstring of transformers' config class",
}
_LONGEST = 170


_HEAD = """# Published forms

In short: {forms} models in the form in which they are published, made small and put through prox24.
{pruned} are pruned and evaluated as transformers does; {refused} are refused with the reason.

Each form has the keys of the published `config.json`, with small sizes (hidden size 32, two blocks
or one of each kind, 259 tokens). Its tensors have the published names and dtype, and the tensors
that the files hold beside the model's are there too. Values are random. `plan`, `prune` (wanda),
`verify` and `eval` run on each.

- *pruned*: all went well, routers kept their bytes, and the loss of the dense and of the pruned
  folder is that of plain transformers {version}, in float32, within {tolerance:g} (relative;
  the largest difference was {worst:.0e}).
- *refused*: exit status 2 with this message, and no output.

`python -m tests.support.published_forms --table` writes this page. The last column says where a
layout was taken from:

{sources}

| published as | what is special | outcome | layout |
| --- | --- | --- | --- |
"""


def names_in(text: str) -> list[str]:
    """The names of the forms that a page has rows for, in its order."""
    return re.findall(r"^\| `?(.+?)`? \| .* \|$", text, re.MULTILINE)[2:]


def page(outcomes: Mapping[str, Outcome]) -> str:
    """The whole page."""
    right = [outcome for name, outcome in outcomes.items() if outcome.is_as(FORMS[name])]
    refused = sum(outcome.refusal is not None for outcome in right)
    differences = [max(o.dense or 0, o.pruned or 0) for o in right]
    head = _HEAD.format(
        forms=len(outcomes),
        pruned=len(right) - refused,
        refused=refused,
        version=transformers.__version__,
        tolerance=TOLERANCE,
        worst=max(differences, default=0.0),
        sources="\n".join(f"- *{key}*: {text}." for key, text in _SOURCES.items()),
    )
    return head + "".join(_row(name, outcome) for name, outcome in outcomes.items())


def _row(name: str, outcome: Outcome) -> str:
    form = FORMS[name]
    shown = f"`{name}`" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else name
    cells = [shown, form.special, _result(name, outcome), form.source]
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |\n"


def _result(name: str, outcome: Outcome) -> str:
    form = FORMS[name]
    if not outcome.is_as(form):
        due = "pruned" if form.outcome == PRUNED else "refused"
        return f"not yet: to be {due} ({BROKEN.get(name, 'see the tests')})"
    if outcome.refusal is None:
        return "pruned"
    reason = outcome.refusal.removeprefix("prox24: ")
    reason = re.sub(r"/\S*/source(/(\S+?))?(:? )", r"\2\3", reason).removeprefix(": ")
    reason = reason.split("; ")[0]
    reason = reason if len(reason) <= _LONGEST else reason[: _LONGEST - 1] + "…"
    return f"refused: {reason}"
