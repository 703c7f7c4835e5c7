"""Models as they are published: what transformers makes of their files is what prox24 prunes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.published_forms.all_forms import FORMS
from tests.support.published_forms.broken import BROKEN
from tests.support.published_forms.form import Form
from tests.support.published_forms.outcome import try_form
from tests.support.published_forms.table import PAGE, names_in

LEAST = 110
"""Of the forms that docs/published-forms.md lists."""


def cases() -> list[object]:
    """A case for each form; those that are not quick are slow, those that fail are expected to."""
    found = []
    for name, form in FORMS.items():
        marks: list[pytest.MarkDecorator] = [] if form.quick else [pytest.mark.slow]
        if name in BROKEN:
            marks.append(pytest.mark.xfail(strict=True, reason=BROKEN[name]))
        found.append(pytest.param(form, id=name, marks=marks))
    return found


@pytest.mark.parametrize("form", cases())
def test_a_published_form(form: Form, tmp_path: Path) -> None:
    """Planned, pruned, verified and evaluated as transformers does; or refused, by all alike."""
    outcome = try_form(form, tmp_path)
    assert outcome.is_as(form), outcome


def test_the_page_has_a_row_for_each_form() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert names_in(text) == list(FORMS)
    assert len(FORMS) >= LEAST
    assert "not yet" not in text or BROKEN
    assert set(BROKEN) <= set(FORMS)


def test_other_pages_lead_there() -> None:
    for page in ("models.md", "README.md"):
        assert PAGE.name in (PAGE.parent / page).read_text(encoding="utf-8")
