"""The options of reading a text, which `prune` and `eval` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.fields import option

FILES = (
    "a local .txt, .jsonl, .json, .csv, .tsv (each also .gz, .zst or .bz2), .parquet or .arrow "
    "file, or a folder of them"
)


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How a text is read."""

    text_column: str | None = option(
        None,
        "column that holds the text, as strings or as messages; `a.b` goes into an object, "
        "`prompt+response` makes a conversation of two; unset: `text`, or a known form of "
        "conversations",
    )
    chat_template: str | None = option(
        None,
        "file with the Jinja template that conversations are rendered with; unset: the "
        "tokenizer's own",
    )
    bos: Literal["auto", "always", "never"] = option(
        "auto",
        "whether every sequence starts with the BOS token; auto: if the tokenizer puts one before "
        "a single text",
    )

    def cut_from(self) -> tuple[Any, ...]:
        """The values of these options, by which equal texts are known."""
        return self.text_column, self.chat_template, self.bos
