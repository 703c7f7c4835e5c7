"""The one look of all that is printed: 80 columns, plain tables, labelled lines, one kind of bar.

Colours and bars are for terminals that can show them; rich honours NO_COLOR by itself.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TextIO, cast

import rich.box
import rich.console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from pipeline.runtime.units import duration
from storage.files.names import printable
from storage.files.os_errors import explained

WIDTH = 80
_BAR = 20


def terminal(stderr: bool = True) -> rich.console.Console:
    """A console of at most 80 columns, on standard error or output."""
    console = rich.console.Console(stderr=stderr, highlight=False)
    console.width = min(console.width, WIDTH)
    return console


def shows_bars(console: rich.console.Console) -> bool:
    """Whether a line can be drawn over: not in a file or pipe, nor where TERM is `dumb`."""
    return console.is_terminal and not console.is_dumb_terminal


class _TimeLeft(ProgressColumn):
    """The time left as the caller knows it."""

    def __init__(self, left: Callable[[], float | None]) -> None:
        super().__init__()
        self._left = left

    def render(self, task: Task) -> Text:
        """`2:05`, or `-:--` where it is not known yet."""
        left = self._left()
        return Text("-:--" if left is None else duration(left), style="progress.remaining")


def bar(
    console: rich.console.Console,
    counted: str,
    left: Callable[[], float | None] | None = None,
) -> Progress:
    """A bar on one line: what is done, how much of it, time gone, time left, and `error`.

    counted: how the amount is written, as a template of `task`. Tasks need the field `error`. left:
    seconds left; by default they follow from the last 30 s, for amounts that grow all the time.
    """
    return Progress(
        TextColumn("{task.description:<20}", markup=False),
        BarColumn(bar_width=_BAR),
        TextColumn(counted),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn() if left is None else _TimeLeft(left),
        TextColumn("{task.fields[error]}", markup=False),
        console=console,
    )


def print_labelled(console: rich.console.Console, rows: Iterable[tuple[str, Any]]) -> None:
    """Lines of a label and a text (or anything else that rich draws) beside it."""
    table = Table.grid(padding=(0, 2), expand=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(printable(value)) if isinstance(value, str) else value)
    if console.is_terminal:
        console.print(table)
    else:  # in a file no line should end in blanks, with which rich fills its tables
        console.print(as_text([table]), end="", markup=False, soft_wrap=True)


def plain_table(columns: Sequence[str], title: str | None = None, *, fold: bool = False) -> Table:
    """An empty table: the first column to the left and folded where it must, the others right.

    fold: whether the others may be folded too, which else are never cut.
    """
    table = Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        right = index > 0
        table.add_column(
            name,
            justify="right" if right else "left",
            no_wrap=right and not fold,
            overflow="fold",
        )
    return table


def as_text(parts: Iterable[Any]) -> str:
    """Texts and tables as plain text of at most 80 columns, a line end after each."""
    console = rich.console.Console(
        file=io.StringIO(), width=WIDTH, highlight=False, markup=False, color_system=None
    )
    for part in parts:
        console.print(part)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


class OutputClosed(Exception):
    """Who reads standard output has read enough, as `head` does: nothing is said of it."""

    exit_code: ClassVar[int] = 128 + signal.SIGPIPE


class _CheckedStdout:
    """Standard output; its errors name it. failed: whether there was one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.failed = stream, False

    def write(self, text: str) -> int:
        """As of the stream."""
        with self._checked():
            return self._stream.write(text)

    def flush(self) -> None:
        """As of the stream."""
        with self._checked():
            self._stream.flush()

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            with explained(Path("standard output")):
                yield
        except Exception:
            self.failed = True
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def checked_stdout() -> Iterator[None]:
    """What is printed inside has arrived at the end.

    Raises ResourceError where standard output is a file on a full disk, `OutputClosed` where it is
    a pipe that no one reads any more. The rest of what was printed is then dropped: else Python
    tries again at its own end, and complains in its own words.
    """
    stream = sys.stdout
    checked = _CheckedStdout(stream)
    try:
        with contextlib.redirect_stdout(cast(TextIO, checked)):
            yield
            checked.flush()
    except BaseException as error:
        if checked.failed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if isinstance(error, BrokenPipeError):
                raise OutputClosed from error
        raise
