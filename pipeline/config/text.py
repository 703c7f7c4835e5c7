"""The options of reading a text, which `prune` and `eval` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pipeline.config.fields import option

FILES = (
    "a local .txt, .jsonl, .json, .csv, .tsv (each also .gz, .zst or .bz2), .parquet or .arrow "
    "file, or a folder of them"
)


def unless_read(config: TextOptions) -> str | None:
    """The condition of what concerns the reading of a text."""
    return config.without_text()


def _noted(config: TextOptions) -> bool:
    return config.text_is_noted


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How a text is read.

    text_is_noted: whether these options are noted, not refused, where no text is read.
    """

    text_is_noted: ClassVar[bool] = False

    text_column: str | None = option(
        None,
        "column that holds the text, as strings or as messages; `a.b` goes into an object, "
        "`prompt+response` makes a conversation of two; unset: `text`, or a known form of "
        "conversations",
        unused=unless_read,
        noted=_noted,
    )
    chat_template: str | None = option(
        None,
        "file with the Jinja template that conversations are rendered with; unset: the "
        "tokenizer's own",
        path=True,
        unused=unless_read,
        noted=_noted,
    )
    bos: Literal["auto", "always", "never"] = option(
        "auto",
        "whether every sequence starts with the BOS token; auto: if the tokenizer puts one before "
        "a single text",
        unused=unless_read,
        noted=_noted,
    )

    def without_text(self) -> str | None:
        """Why no text is read; None where one is."""
        return None

    def cut_from(self) -> tuple[Any, ...]:
        """The values of these options, by which equal texts are known."""
        return self.text_column, self.chat_template, self.bos
