"""The figures of the report, drawn by matplotlib as data URIs of SVG images."""

from __future__ import annotations

import base64
import io
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from pipeline.config.pattern import Pattern
from pipeline.reconstruct.results import PHASES as RECONSTRUCTION_PHASES
from pipeline.reporting.layer_table import (
    by_kind,
    error_of,
    kind_table,
    positions_kept,
    without_pauses,
)
from pipeline.reporting.reconstruction import output_errors
from pipeline.runtime.units import duration

# The colour-blind-safe palette of Okabe and Ito, and more colours for models with many kinds.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#637939",
            "#7B4173", "#999999")  # fmt: skip
_PHASES = ("embed", "propagate", "advance", "calibrate", "reduce", "choose", "solve",
           *RECONSTRUCTION_PHASES)  # fmt: skip
_WIDTH = 10.0  # inches
_LEGEND: dict[str, Any] = {
    "loc": "upper left",
    "bbox_to_anchor": (1.01, 1.02),
    "frameon": False,
    "fontsize": 9,
}
_STYLE: dict[Any, Any] = {
    # Text as text, not as outlines: small files, in the fonts of the reader.
    "svg.fonttype": "none",
    "svg.hashsalt": "prox24",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "text.parse_math": False,
}
# More shapes than this are rasterized, so that files stay small for large jobs.
_MOST_SHAPES = 3000
_PIXELS_PER_INCH = 200
_LONGEST_PAUSE = 60.0  # seconds
_LANES_NAMED = 40


def _image(draw: Callable[[Figure], None], height: float) -> str:
    """The drawing of `draw` as a data URI. height: in inches."""
    # Users need not see its warnings about a home without write permission, or a font search.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height))
        draw(figure)
        raw = io.BytesIO()
        figure.savefig(raw, format="svg", dpi=_PIXELS_PER_INCH, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(raw.getvalue()).decode("ascii")


def _axes(figure: Figure, *, bottom: float = 0.14, top: float = 0.94, left: float = 0.08) -> Axes:
    """One pair of axes, with space for a legend on the right."""
    return figure.add_axes((left, bottom, 0.76 - left, top - bottom))


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _scale(axes: Axes, which: str, layers: Sequence[Mapping[str, Any]]) -> None:
    """Sets up the error axis ("x" or "y"): logarithmic if errors differ by more than 10 times."""
    positive = [error for error in map(error_of, layers) if 0 < error < math.inf]
    if positive and max(positive) > 10 * min(positive):
        axes.set(**{f"{which}scale": "log"})
        axis = axes.xaxis if which == "x" else axes.yaxis
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set(**{f"{which}label": "relative error, %"})


def error_by_depth(layers: Sequence[Mapping[str, Any]], blocks: Sequence[Mapping[str, Any]]) -> str:
    """Relative error of each kind of layer against the block; of whole blocks in black."""

    def draw(figure: Figure) -> None:
        axes = _axes(figure)
        many = len({layer["block"] for layer in layers}) > 40
        marker: dict[str, Any] = {"marker": "." if many else "o", "markersize": 4, "linewidth": 1.2}
        for number, (kind, members) in enumerate(by_kind(layers).items()):
            errors: dict[int, list[float]] = {}
            for layer in members:
                if (error := error_of(layer)) < math.inf:
                    errors.setdefault(layer["block"], []).append(error)
            means = [fmean(values) for values in errors.values()]
            axes.plot(list(errors), means, label=kind, color=_colour(number), **marker)
            if any(len(values) > 1 for values in errors.values()):
                lowest, highest = map(min, errors.values()), map(max, errors.values())
                axes.fill_between(
                    list(errors), list(lowest), list(highest), color=_colour(number), alpha=0.15
                )
        known = [block for block in blocks if block["relative_error"] is not None]
        axes.plot(
            [block["block"] for block in known],
            [block["relative_error"] for block in known],
            color="black", linestyle="--", label="whole block",
        )  # fmt: skip
        _scale(axes, "y", layers)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.legend(**_LEGEND)

    return _image(draw, 4.0)


def output_error_by_depth(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Error of the outputs of reconstructed blocks against the block, before and after."""
    lines = output_errors(blocks)
    errors = [error for points in lines.values() for _, error in points if error > 0]

    def draw(figure: Figure) -> None:
        axes = _axes(figure)
        marker = "." if len(blocks) > 40 else "o"
        for name, points in lines.items():
            own, after = name.startswith("learned"), "first" not in name and "before" not in name
            axes.plot(
                [block for block, _ in points], [error for _, error in points], label=name,
                color=_colour(int(after)), linestyle="--" if own else "-", linewidth=1.2,
                marker=marker, markersize=4,
            )  # fmt: skip
        if errors and max(errors) > 10 * min(errors):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.set_ylabel("error of the output, %")
        axes.legend(**_LEGEND)

    return _image(draw, 4.0)


def error_by_kind(layers: Sequence[Mapping[str, Any]]) -> str:
    """Relative error of every layer, one row per kind; medians as bars, the worst block named."""
    table = kind_table(layers)

    def draw(figure: Figure) -> None:
        axes = _axes(figure, bottom=0.5 / height, top=1 - 0.15 / height, left=0.22)
        groups = by_kind(layers)
        for row, entry in enumerate(table):
            errors = [error for error in map(error_of, groups[entry["kind"]]) if error < math.inf]
            axes.scatter(
                errors, [row] * len(errors), s=18, alpha=0.5, color=_colour(row), linewidths=0,
                rasterized=len(layers) > _MOST_SHAPES,
            )  # fmt: skip
            if entry["median"] < math.inf:
                middle = [entry["median"]] * 2
                axes.plot(middle, [row - 0.3, row + 0.3], color="black", linewidth=1.5)
            if entry["worst"] < math.inf:
                axes.annotate(
                    f"block {entry['worst_block']}", (entry["worst"], row), (7, 0),
                    textcoords="offset points", va="center", fontsize=8, color="#444444",
                )  # fmt: skip
        _scale(axes, "x", layers)
        axes.set_yticks(range(len(table)), [entry["kind"] for entry in table])
        axes.set_ylim(len(table) - 0.5, -0.5)

    height = 0.9 + 0.32 * len(table)
    return _image(draw, height)


def _ordered(phases: Sequence[str]) -> list[str]:
    """The distinct phases, in the order in which a block runs them."""
    return sorted(set(phases), key=lambda name: (name not in _PHASES, *_index(name)))


def _index(phase: str) -> tuple[int, str]:
    return (_PHASES.index(phase) if phase in _PHASES else len(_PHASES), phase)


def _phase_colour(phase: str) -> str:
    return _colour(_index(phase)[0])


def time_and_memory(blocks: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of each block by phase, stacked; below, peak memory of the largest worker."""

    def draw(figure: Figure) -> None:
        above = figure.add_axes((0.08, 0.56, 0.68, 0.40))
        below = figure.add_axes((0.08, 0.10, 0.68, 0.38), sharex=above)
        numbers = [block["block"] for block in blocks]
        bottom = [0.0] * len(blocks)
        for phase in _ordered([name for block in blocks for name in block["phases"]]):
            colour = _phase_colour(phase)
            phases = [block["phases"].get(phase) for block in blocks]
            seconds = [0.0 if p is None else float(p["seconds"]) for p in phases]
            above.bar(numbers, seconds, 0.85, bottom, label=phase, color=colour)
            bottom = [low + more for low, more in zip(bottom, seconds, strict=True)]
            there = [(n, p) for n, p in zip(numbers, phases, strict=True) if p is not None]
            at = [n for n, _ in there]
            host = [p["rss_bytes"] / 2**30 for _, p in there]
            device = [p["device_bytes"] / 2**30 for _, p in there]
            below.plot(at, host, marker=".", color=colour)
            if any(device):
                below.plot(at, device, marker=".", linestyle=":", color=colour)
        driver = [block["memory"]["driver_rss_bytes"] / 2**30 for block in blocks]
        below.plot(numbers, driver, color="black", linestyle="--", label="driver")
        below.plot([], [], color="#777777", label="worker, host")
        if any(p["device_bytes"] for block in blocks for p in block["phases"].values()):
            below.plot([], [], color="#777777", linestyle=":", label="worker, GPU")
        above.xaxis.set_major_locator(MaxNLocator(integer=True))
        above.set_ylabel("seconds")
        below.set_ylim(bottom=0)
        below.set_ylabel("peak memory, GiB")
        below.set_xlabel("block")
        above.legend(**_LEGEND)
        below.legend(**_LEGEND)

    return _image(draw, 5.2)


def workers_timeline(
    spans: Sequence[Mapping[str, Any]], workers: Sequence[Mapping[str, Any]]
) -> str:
    """One lane per worker process, with its phases over time. Long pauses are cut out."""
    moved, pauses = without_pauses(spans, _LONGEST_PAUSE)
    shapes = sum(len(span["workers"]) for span in moved)
    longest = max(span["start"] + span["seconds"] for span in moved)
    unit, name = (3600, "hours") if longest > 7200 else (60, "minutes")
    height = 0.9 + min(9.0, 0.32 * len(workers))

    def draw(figure: Figure) -> None:
        axes = _axes(figure, bottom=0.5 / height, top=1 - 0.25 / height, left=0.2)
        for phase in _ordered([span["phase"] for span in moved]):
            bars = [bar for span in moved if span["phase"] == phase for bar in _bars(span, workers)]
            for lane in sorted({lane for lane, _, _ in bars}):
                axes.broken_barh(
                    [(start / unit, busy / unit) for n, start, busy in bars if n == lane],
                    (lane - 0.4, 0.8), color=_phase_colour(phase), linewidth=0,
                    rasterized=shapes > _MOST_SHAPES,
                )  # fmt: skip
            axes.broken_barh([], (0, 0), color=_phase_colour(phase), label=phase)
        for pause in pauses:
            axes.axvline(pause.at / unit, color="black", linestyle="--", linewidth=1)
            axes.annotate(
                f"nothing for {duration(pause.seconds)}", (pause.at / unit, 1), (0, 3),
                xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8,
                ha="center",
            )  # fmt: skip
        if len(workers) <= _LANES_NAMED:
            names = [f"worker {w['rank']} on {w['host']}" for w in workers]
            axes.set_yticks(range(len(workers)), names)
        axes.set_ylim(len(workers) - 0.5, -0.5)
        axes.set_xlabel(f"{name} of work")
        axes.legend(**_LEGEND)

    return _image(draw, height)


def _bars(
    span: Mapping[str, Any], workers: Sequence[Mapping[str, Any]]
) -> list[tuple[int, float, float]]:
    """(lane, start, seconds) of each worker in a span.

    Workers in the same process run one after another.
    """
    bars = []
    ended: dict[tuple[Any, Any], float] = {}
    for lane, busy in zip(span["workers"], span["busy"], strict=True):
        process = (workers[lane]["host"], workers[lane]["pid"])
        start = ended.get(process, float(span["start"]))
        ended[process] = start + busy
        bars.append((lane, start, float(busy)))
    return bars


def masks(layers: Sequence[Mapping[str, Any]]) -> str:
    """Left: share of the kept weights that magnitude pruning keeps, too. Right: kept positions.

    The right plot shows the kinds of layers with N:M groups only.
    """
    table = [entry for entry in kind_table(layers) if entry["groups"]]

    def draw(figure: Figure) -> None:
        wide = 0.44 if table else 0.9
        shares = figure.add_axes((0.07, 0.14, wide - 0.07, 0.78))
        for number, (_, members) in enumerate(by_kind(layers).items()):
            at = [layer["block"] for layer in members]
            values = [100 * (layer["magnitude_share"] or 0.0) for layer in members]
            style = "-" if len(set(at)) == len(at) else ""
            shares.plot(
                at, values, marker=".", linestyle=style, color=_colour(number),
                rasterized=len(layers) > _MOST_SHAPES,
            )  # fmt: skip
        shares.xaxis.set_major_locator(MaxNLocator(integer=True))
        shares.set_xlabel("block (colours as in the first figure)")
        shares.set_ylabel("% that magnitude keeps too")
        if table:
            _positions(figure.add_axes((0.62, 0.14, 0.24, 0.78)), table)

    return _image(draw, max(3.6, 0.9 + 0.32 * len(table)))


def _positions(axes: Axes, table: Sequence[Mapping[str, Any]]) -> None:
    keeps = [Pattern.parse(entry["pattern"]).keep for entry in table]
    shares = [
        positions_kept(entry["groups"], keep) for entry, keep in zip(table, keeps, strict=True)
    ]
    names = list(dict.fromkeys(name for by_positions in shares for name in by_positions))
    left = [0.0] * len(table)
    for number, name in enumerate(names):
        widths = [100 * by_positions.get(name, 0.0) for by_positions in shares]
        axes.barh(range(len(table)), widths, 0.8, left, label=_shown(name), color=_colour(number))
        left = [start + more for start, more in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(table)), [entry["kind"] for entry in table])
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlabel("% of groups, by what they keep")
    axes.legend(**_LEGEND)


def _shown(positions: str) -> str:
    """A key of `positions_kept` as text: `1010` as boxes, `3` as a position."""
    if positions == "fewer":
        return "fewer kept"
    if len(positions) == 1:
        return f"position {positions}"
    return positions.replace("1", "■").replace("0", "□")
