"""Token sequences that were cut from a text, with what was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TokenSequences:
    """Sequences of equal length.

    ids: (n, seqlen) int64. counted: (n, seqlen) bool, the tokens whose statistics are taken; None
    for all of them. text: what was read and how, as JSON, for the job's records:

        read, files            what was read as the text, in words; number of files
        rows, rows_without_text   rows that were read, and those of them without a text
        conversations, refused, first_refusal   conversations that the chat template took and
                               refused, and the first reason
        sequences, bos         how they were cut, in words; the tokens at the start of each
        note                   what is odd about the text
    """

    ids: Tensor
    counted: Tensor | None = None
    text: dict[str, Any] = field(default_factory=dict)


def text_in_words(text: Mapping[str, Any]) -> str:
    """`TokenSequences.text` as one line for people; empty without any."""
    if not text.get("read"):
        return ""
    files = f" of {text['files']} files" if text.get("files", 0) > 1 else ""
    rows = []
    if "rows" in text:
        rows = [f"{text['rows']:,} rows read"]
        if text["rows_without_text"]:
            rows.append(f"{text['rows_without_text']:,} of them without text")
    if text.get("refused"):
        rows.append(
            f"{text['refused']:,} conversations left out, the first because: "
            f"{text['first_refusal']}"
        )
    read = f"{text['read']}{files}" + (f" ({'; '.join(rows)})" if rows else "")
    return f"{read}; {text['sequences']}; BOS of each: {text['bos']}"
