"""Plots of a sweep, as in papers: a quantity against an option, with one line per method."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.files.commit import replace_file

_MARKERS = "osD^vP*X"
# Values are drawn on a logarithmic axis if they differ by this factor or more.
_WIDE = 4.0
_PANEL_INCHES = (4.4, 3.4)


@dataclass(frozen=True)
class Line:
    """One line: `xs` as written, `ys` None where there is no value."""

    name: str
    xs: tuple[str, ...]
    ys: tuple[float | None, ...]


@dataclass(frozen=True)
class Panel:
    """One plot. level: the value of the dense model, as a horizontal line; None for no line."""

    quantity: str
    lines: tuple[Line, ...]
    level: float | None = None


def draw(
    folder: Path,
    stem: str,
    axis: str,
    panels: Sequence[Panel],
    guard: Callable[[], None] | None = None,
) -> list[Path]:
    """Draws the panels side by side into STEM.png and STEM.svg; returns their paths.

    axis: label of the horizontal axes. guard: as in `replace_file`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # A file must depend only on the values drawn: fixed ids, no dates.
    with matplotlib.rc_context({"svg.hashsalt": stem, "font.size": 9}):
        width, height = _PANEL_INCHES
        figure = Figure(figsize=(width * len(panels), height), layout="constrained")
        for number, panel in enumerate(panels, start=1):
            _draw(figure.add_subplot(1, len(panels), number), axis, panel)
        paths = []
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            drawn = io.BytesIO()
            figure.savefig(drawn, format=kind, dpi=150, metadata=metadata)
            paths.append(folder / f"{stem}.{kind}")
            with replace_file(paths[-1], guard) as file:
                file.write(drawn.getvalue())
    return paths


def _draw(axes: Any, axis: str, panel: Panel) -> None:
    ticks = list(dict.fromkeys(x for line in panel.lines for x in line.xs))
    where = positions(ticks)
    for number, line in enumerate(panel.lines):
        points = [(where[x], y) for x, y in zip(line.xs, line.ys, strict=True) if y is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=f"C{number}",  # in every panel the same, also where another line is missing
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=4,
                linewidth=1.2,
                label=line.name.replace("$", r"\$") or None,
            )
    if panel.level is not None:
        axes.axhline(panel.level, color="0.4", linestyle="--", linewidth=1, label="dense")
    values = [y for line in panel.lines for y in line.ys if y is not None]
    if values and min(values) > 0 and max(values) >= _WIDE * min(values):
        axes.set_yscale("log")
    axes.set_xticks([where[x] for x in ticks], ticks)
    axes.set_xlabel(axis)
    axes.set_ylabel(panel.quantity)
    axes.grid(True, linewidth=0.4, alpha=0.6)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)


def positions(ticks: Sequence[str]) -> dict[str, float]:
    """Value, as written -> its position on the (linear) axis.

    Non-negative numbers that span a wide range: their base-2 logarithm, with 0 one below the
    smallest. Other numbers: their value. Words: their index.
    """
    try:
        numbers = {tick: float(tick) for tick in ticks}
    except ValueError:
        return {tick: float(index) for index, tick in enumerate(ticks)}
    above = [number for number in numbers.values() if number > 0]
    if not above or min(numbers.values()) < 0 or max(above) < _WIDE * min(above):
        return numbers
    least = math.log2(min(above)) - 1
    return {tick: math.log2(n) if n > 0 else least for tick, n in numbers.items()}
