"""Tables of figures: one list of records, written as Markdown, CSV and parquet."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.files.commit import replace_file

Value = str | int | float | bool | None

# Of a SHA-256 people need no more than what tells it from another.
_HASH = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Column:
    """One column: `name` for programs, `title` for people, `form` a format for its numbers.

    values: one per row; None where there is none. part: tables for people are one for each part.
    """

    name: str
    title: str
    part: str
    values: tuple[Value, ...]
    form: str = ""

    def shown(self, row: int) -> str:
        """The value of a row as people read it."""
        value = self.values[row]
        if value is None:
            return ""
        if isinstance(value, float) or (self.form and isinstance(value, int)):
            return format(value, self.form)
        hashed = _HASH.fullmatch(str(value))
        return hashed[1][:_SHOWN_DIGITS] if hashed else str(value)


@dataclass(frozen=True)
class Table:
    """Named rows and their columns; `notes` are what a reader must know, a sentence each."""

    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    notes: tuple[str, ...] = ()

    def parts(self) -> dict[str, list[Column]]:
        """The columns by part, in order, without those that hold nothing."""
        parts: dict[str, list[Column]] = {}
        for column in self.columns:
            if any(value is not None for value in column.values):
                parts.setdefault(column.part, []).append(column)
        return parts


def known_rows(columns: Sequence[Column]) -> list[int]:
    """Numbers of the rows of which at least one of the columns knows something."""
    rows = range(len(columns[0].values))
    return [row for row in rows if any(column.values[row] is not None for column in columns)]


def markdown(table: Table) -> str:
    """A heading and a table for each part; then the notes."""
    sections = []
    for part, columns in table.parts().items():
        lines = [
            ["run", *(column.title for column in columns)],
            ["---", *("---:" for _ in columns)],
        ]
        for row in known_rows(columns):
            lines.append([table.rows[row], *(column.shown(row) for column in columns)])
        body = "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)
        sections.append(f"## {part}\n\n{body}")
    sections += table.notes
    return "\n\n".join(sections) + "\n"


def arrow(table: Table) -> Any:
    """The same as a `pyarrow.Table`: `run`, then a column for each of the table's."""
    import pyarrow as pa  # in functions: the commands that print tables start without it

    data = {"run": pa.array(table.rows, pa.string())}
    for column in table.columns:
        data[column.name] = _array(column.values)
    return pa.table(data)


def write_table(
    folder: Path, stem: str, table: Table, guard: Callable[[], None] | None = None
) -> list[Path]:
    """Writes STEM.md, STEM.csv and STEM.parquet into `folder`, replacing older ones.

    `guard` as in `replace_file`. Returns their paths. Raises `ResourceError` where the disk is
    full.
    """
    import pyarrow.csv
    import pyarrow.parquet

    data = arrow(table)
    paths = [folder / f"{stem}.{kind}" for kind in ("md", "csv", "parquet")]
    with replace_file(paths[0], guard) as file:
        file.write(markdown(table).encode("utf-8"))
    with replace_file(paths[1], guard) as file:
        pyarrow.csv.write_csv(data, file)
    with replace_file(paths[2], guard) as file:
        pyarrow.parquet.write_table(data, file)
    return paths


def _array(values: Sequence[Value]) -> Any:
    """A column of one type: text where the values are of several."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pa.array([None if value is None else float(value) for value in values])
    if len(kinds) > 1:
        return pa.array([None if value is None else str(value) for value in values])
    return pa.array(values)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
