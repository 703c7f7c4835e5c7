"""`python -m tests.support.published [WORDS]` tries the forms whose names hold one of the words.

Each outcome is printed as it comes; a last line counts those that are as the data states.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path

from tests.support.published.all_forms import FORMS
from tests.support.published.outcome import Outcome, missing_keys, try_form


def main(words: list[str]) -> None:
    """Tries the forms and prints what became of them."""
    right = tried = 0
    for form in FORMS.values():
        if words and not any(word.lower() in form.name.lower() for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = try_form(form, Path(folder))
            except Exception as error:
                if "--debug" in sys.argv:
                    traceback.print_exc()
                outcome = Outcome(wrong=f"{type(error).__name__}: {' '.join(str(error).split())}")
            lacking = ""
            if form.outcome == "pruned":
                try:
                    if missing := missing_keys(form, Path(folder) / "source"):
                        lacking = f" [transformers lacks {sorted(missing)[:4]}]"
                except Exception as error:
                    lacking = f" [transformers: {' '.join(str(error).split())[:300]}]"
        mark = "right" if outcome.is_as(form) else "NOT AS EXPECTED"
        print(f"{form.name}: {mark}: {outcome}{lacking}", flush=True)
        tried, right = tried + 1, right + outcome.is_as(form)
    print(f"{right} of {tried} forms as expected")


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if not word.startswith("--")])
