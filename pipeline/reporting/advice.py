"""What to try next, derived from the results of a job. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline.reconstruct.results import totals
from pipeline.reporting.layer_table import by_kind
from pipeline.solvers.base import NO_INPUT
from pipeline.solvers.registry import solver_class

# An outlier is a layer or block whose error is far above those of the others of its kind, in
# logarithms (scaled median absolute deviations), and large enough to matter.
_DEVIATIONS = 4.0
_SMALLEST_SPREAD = math.log(1.2)
_LEAST_ERROR = 1.0  # percent
_VALUES_NEEDED = 8
_FEW = 0.1  # the largest share of outliers: more of them are not exceptions
_SHOWN = 5
# With fewer tokens per input of a layer than this, its Hessian is noisy.
_TOKENS_PER_COLUMN = 4
# Advice is given if the last step still changed more than this share of the support.
_UNSETTLED = 0.01
_NORMAL = 1.4826  # standard deviation over median absolute deviation, of a normal distribution


@dataclass(frozen=True)
class Advice:
    """What was noticed about `subject` (a layer, a block, a setting), and what to do about it."""

    subject: str
    finding: str
    remedy: str


def advise(
    layers: Sequence[Mapping[str, Any]],
    blocks: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    tokens: int,
    measured: bool,
) -> list[Advice]:
    """What to try next, the most specific advice first; empty where there is none.

    layers: rows of `layer_rows`. blocks: with `block` and `relative_error` (percent, or None).
    settings: the options of the job, with the defaults of the solver. tokens: number of calibration
    tokens that the statistics are taken of. measured: whether the perplexity of the output is
    known.
    """
    return [
        *_layers_apart(layers),
        *_blocks_apart(blocks),
        *_deviations(layers),
        *_little_text(layers, settings, tokens),
        *_unsettled(layers),
        *_reconstruction(blocks),
        *_settings(settings),
        *([] if measured else [_MEASURE]),
    ]


_CONDITION_REMEDY = (
    "More calibration text (--nsamples) or a larger --damping makes the problem better conditioned."
)
_NO_INPUT_REMEDY = (
    "If other text reaches the layer, calibrate on such text (--dataset), or leave the layer dense "
    "(--override NAME=dense); look at the norm before it, whose weights may be 0."
)
_MEASURE = Advice(
    "the whole model",
    "its perplexity was not measured, and errors of layers say little about how well it works.",
    "Compare it with the dense model on your own text: prox24 eval MODEL OUTPUT --dataset TEXT",
)


def outliers(values: Sequence[float]) -> list[int]:
    """Indices of positive values that are far above the others, the largest first.

    Far above: more than 4 scaled median absolute deviations of the logarithms above the median, and
    more than twice the median. Empty for fewer than 8 values, too few for a spread, and where more
    than a tenth of the values are far above: these are not exceptions.
    """
    logs = [math.log(value) for value in values if value > 0]
    if len(logs) < _VALUES_NEEDED:
        return []
    middle = median(logs)
    spread = _NORMAL * median(abs(value - middle) for value in logs)
    limit = max(
        middle + _DEVIATIONS * max(spread, _SMALLEST_SPREAD / _DEVIATIONS), middle + math.log(2)
    )
    far = [n for n, value in enumerate(values) if value > 0 and math.log(value) > limit]
    if len(far) > max(1.0, _FEW * len(logs)):
        return []
    return sorted(far, key=lambda n: -values[n])


def _layers_apart(layers: Sequence[Mapping[str, Any]]) -> Iterator[Advice]:
    outlying = []
    for kind, members in by_kind(layers).items():
        members = [layer for layer in members if layer["relative_error"] is not None]
        errors = [float(layer["relative_error"]) for layer in members]
        outlying += [(errors[n], median(errors), kind, members[n]) for n in outliers(errors)]
    outlying = [entry for entry in outlying if entry[0] >= _LEAST_ERROR]
    outlying.sort(key=lambda entry: -entry[0])
    for error, usual, kind, layer in outlying[:_SHOWN]:
        yield Advice(
            layer["name"],
            f"its error is {error:.2f} %; the median of all {kind} is {usual:.2f} %.",
            f"Save it with --save-layers '{layer['name']}' and replay it with prox24 solve: "
            "another method, damping or shrinkage may suit it better.",
        )


def _blocks_apart(blocks: Sequence[Mapping[str, Any]]) -> Iterator[Advice]:
    known = [block for block in blocks if block["relative_error"] is not None]
    errors = [float(block["relative_error"]) for block in known]
    for n in [n for n in outliers(errors) if errors[n] >= _LEAST_ERROR][:_SHOWN]:
        yield Advice(
            f"block {known[n]['block']}",
            f"its error is {errors[n]:.2f} %; the median block's is {median(errors):.2f} %.",
            "Look for the layer that causes it in the figures, and try more calibration text "
            "(--nsamples): inputs of the first and last blocks differ from those of the others.",
        )


def _deviations(layers: Sequence[Mapping[str, Any]]) -> Iterator[Advice]:
    by_deviation: dict[str, list[str]] = {}
    for layer in layers:
        for deviation in layer["deviations"]:
            by_deviation.setdefault(deviation, []).append(layer["name"])
    for deviation, names in sorted(by_deviation.items()):
        yield Advice(
            names[0] if len(names) == 1 else f"{len(names)} layers, the first {names[0]}",
            f"not solved as asked: {deviation}.",
            _NO_INPUT_REMEDY if deviation == NO_INPUT else _CONDITION_REMEDY,
        )


def _little_text(
    layers: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], tokens: int
) -> Iterator[Advice]:
    full = [layer for layer in layers if layer["statistic"] == "full"]
    widest = max((int(layer["columns"]) for layer in full), default=0)
    if tokens < _TOKENS_PER_COLUMN * widest:
        # More sequences have as many tokens that count as these have, in the mean.
        wanted = -(-_TOKENS_PER_COLUMN * widest * settings["nsamples"] // tokens)
        yield Advice(
            "calibration",
            f"{tokens:,} tokens are few for layers with {widest:,} inputs: the second moments "
            "that the solver uses are noisy.",
            f"Use more text: --nsamples {wanted} or more.",
        )


def _unsettled(layers: Sequence[Mapping[str, Any]]) -> Iterator[Advice]:
    moving = [
        layer
        for layer in layers
        if solver_class(layer["method"]).unsettled_advice
        and float(layer["support_change"]) > _UNSETTLED
    ]
    if moving:
        worst = max(moving, key=lambda layer: float(layer["support_change"]))
        yield Advice(
            worst["name"],
            f"the last step still changed {100 * float(worst['support_change']):.1f} % of its mask "
            f"(more than 1 % in {len(moving)} layers).",
            str(solver_class(worst["method"]).unsettled_advice),
        )


def _reconstruction(blocks: Sequence[Mapping[str, Any]]) -> Iterator[Advice]:
    together = totals(block.get("reconstruct") for block in blocks)
    if together is None:
        return
    subject, count = "reconstruction", together["blocks"]
    if together["not_finite"]:
        yield Advice(
            subject,
            f"a loss was not finite in {together['not_finite']} of {count} blocks, which keep "
            "earlier weights.",
            "Lower --reconstruct-lr.",
        )
    elif 2 * together["kept_solved"] > count:
        yield Advice(
            subject,
            f"{together['kept_solved']} of {count} blocks keep their solved weights: no epoch "
            "lowered the error of the held-out sequences.",
            "More text (--nsamples) or a lower --reconstruct-lr may help.",
        )


def _settings(settings: Mapping[str, Any]) -> Iterator[Advice]:
    method = settings["method"]
    if not solver_class(method).joint:
        yield Advice(
            f"--method {method}",
            "methods that optimize mask and weights together have lower errors at 2:4.",
            "Try --method prox_admm, the default, on the same text.",
        )
    if solver_class(method).statistic != "none" and settings["refine"] == "none":
        yield Advice(
            "--refine none",
            "the kept weights were not adjusted to the mask.",
            "Try --refine cg: it lowers the error of any method without changing the mask.",
        )
