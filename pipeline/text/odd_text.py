"""Whether what was read looks like a text: ids and hashes calibrate a model to nothing."""

from __future__ import annotations

import unicodedata

_FEWEST = 200  # characters that say anything


def oddity(text: str) -> str | None:
    """What is odd about a text, as a sentence; None for a text like any other.

    A text in a script that is written without spaces (Chinese, Japanese, Thai) is not odd.
    """
    letters = [letter for letter in text if not letter.isspace()]
    if len(letters) < _FEWEST:
        return None
    digits = sum(letter.isdigit() for letter in letters)
    if 2 * digits > len(letters):
        return (
            f"{100 * digits // len(letters)} % of the text's characters are digits: see that "
            "--text-column names the text"
        )
    spaces = len(text) - len(letters)
    if spaces * 100 < len(text) and not 2 * sum(map(_without_spaces, letters)) > len(letters):
        return "the text has hardly a space: see that --text-column names the text"
    return None


def _without_spaces(letter: str) -> bool:
    """Whether a letter is of a script that is written without spaces between words."""
    if letter.isascii():
        return False
    return unicodedata.east_asian_width(letter) in "WF" or unicodedata.name(letter, "").startswith(
        ("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
    )
