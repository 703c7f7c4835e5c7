"""`python -m tests.support.published_forms [WORDS] [--table]` tries published forms.

Those whose names hold one of the words, else all. Each outcome is printed as it comes; a last line
counts those that are as the data states. --table writes docs/published-forms.md (of all forms).
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

from tests.support.published_forms.all_forms import FORMS
from tests.support.published_forms.broken import BROKEN
from tests.support.published_forms.outcome import Outcome, try_form
from tests.support.published_forms.table import PAGE, page


def main(arguments: list[str]) -> None:
    """Tries the forms, prints what became of them, and writes the page if it is asked for."""
    words = [word.lower() for word in arguments if not word.startswith("--")]
    outcomes: dict[str, Outcome] = {}
    for name, form in FORMS.items():
        if words and not any(word in name.lower() for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = try_form(form, Path(folder))
            except Exception as error:
                if "--debug" in arguments:
                    traceback.print_exc()
                outcome = Outcome(wrong=f"{type(error).__name__}: {' '.join(str(error).split())}")
        outcomes[name] = outcome
        mark = "right" if outcome.is_as(form) else "NOT AS EXPECTED"
        print(f"{name}: {mark}: {outcome}", flush=True)
    right = sum(outcome.is_as(FORMS[name]) for name, outcome in outcomes.items())
    print(f"{right} of {len(outcomes)} forms as expected")
    cured = [name for name in BROKEN if name in outcomes and outcomes[name].is_as(FORMS[name])]
    if cured:
        print(f"to be taken out of broken.py: {cured}")
    if "--table" in arguments:
        if words:
            sys.exit("--table is of all forms: give no words")
        PAGE.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
