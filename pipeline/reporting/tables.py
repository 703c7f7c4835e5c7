"""Tables of results, written as Markdown, CSV and Parquet."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.files.commit import replace_file

Value = str | int | float | bool | None

# Only the first digits of a SHA-256 are shown.
_HASH = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Column:
    """One column.

    name: for programs. title: for readers. part: Markdown has one table for each part. values: one
    per row, None where there is none. form: format of the numbers.
    """

    name: str
    title: str
    part: str
    values: tuple[Value, ...]
    form: str = ""

    def shown(self, row: int) -> str:
        """The value of a row as text."""
        value = self.values[row]
        if value is None:
            return ""
        if isinstance(value, float) or (self.form and isinstance(value, int)):
            return format(value, self.form)
        hashed = _HASH.fullmatch(str(value))
        return hashed[1][:_SHOWN_DIGITS] if hashed else str(value)


@dataclass(frozen=True)
class Table:
    """Named rows and their columns. notes: sentences that a reader must know."""

    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    notes: tuple[str, ...] = ()

    def parts(self) -> dict[str, list[Column]]:
        """The columns by part, in order, without empty ones."""
        parts: dict[str, list[Column]] = {}
        for column in self.columns:
            if any(value is not None for value in column.values):
                parts.setdefault(column.part, []).append(column)
        return parts


KINDS = ("md", "csv", "parquet")
"""The files of a table, in the order in which they are written."""


def known_rows(columns: Sequence[Column]) -> list[int]:
    """Indices of the rows in which at least one of the columns has a value."""
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
    """The table as a `pyarrow.Table`: `run`, then its columns."""
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
    paths = [folder / f"{stem}.{kind}" for kind in KINDS]
    with replace_file(paths[0], guard) as file:
        file.write(markdown(table).encode("utf-8"))
    with replace_file(paths[1], guard) as file:
        pyarrow.csv.write_csv(data, file)
    with replace_file(paths[2], guard) as file:
        pyarrow.parquet.write_table(data, file)
    return paths


def _array(values: Sequence[Value]) -> Any:
    """The values as an Arrow array: floats for numbers of two types, else text for mixed types."""
    import pyarrow as pa

    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pa.array([None if value is None else float(value) for value in values])
    if len(kinds) > 1:
        return pa.array([None if value is None else str(value) for value in values])
    return pa.array(values)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
