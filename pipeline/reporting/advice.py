"""What to try next, where a job's figures give a reason. Pure: figures in, sentences out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline.reporting.layer_table import by_kind
from pipeline.solvers.registry import solver_class

# A layer or block stands out that is far outside the spread of its like, in logarithms (scaled
# median absolute deviations, at least a factor), and large enough to matter.
_DEVIATIONS = 4.0
_SMALLEST_SPREAD = math.log(1.2)
_WORTH_A_LOOK = 1.0  # per cent
_LIKE_NEEDED = 8
_FEW = 0.1  # of the like: more than that are a kind of their own
_SHOWN = 5
# Fewer tokens than that for each input of a layer leave its Hessian noisy.
_TOKENS_PER_COLUMN = 4
# A share of the support that the last step still changed.
_UNSETTLED = 0.01
_NORMAL = 1.4826  # of a normal distribution: standard deviation over median absolute deviation


@dataclass(frozen=True)
class Advice:
    """`subject` (a layer, a block, a setting): what is the matter, and what to do about it."""

    subject: str
    finding: str
    remedy: str


def advise(
    layers: Sequence[Mapping[str, Any]],
    blocks: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    *,
    measured: bool,
) -> list[Advice]:
    """What to try, most telling first; empty where nothing stands out.

    layers: rows of `layer_rows`. blocks: `block` and `relative_error` (per cent, or None).
    settings: the job's options, solver defaults filled in. measured: whether the output's
    perplexity is known.
    """
    return [
        *_layers_apart(layers),
        *_blocks_apart(blocks),
        *_deviations(layers),
        *_little_text(layers, settings),
        *_unsettled(layers),
        *_settings(settings),
        *([] if measured else [_MEASURE]),
    ]


_MEASURE = Advice(
    "the whole model",
    "its perplexity was not measured, and errors of layers say little of a model's use.",
    "Hold it against the dense one on your own text: prox24 eval MODEL OUTPUT --dataset TEXT",
)


def outliers(values: Sequence[float]) -> list[int]:
    """Indices of positive values that lie far above the others, the largest first.

    Far: more than 4 scaled median absolute deviations of the logarithms, and more than twice the
    median. None among fewer than 8 values, which have no spread to speak of, and none where more
    than a tenth are that far: they are a kind of their own.
    """
    logs = [math.log(value) for value in values if value > 0]
    if len(logs) < _LIKE_NEEDED:
        return []
    middle = median(logs)
    spread = _NORMAL * median(abs(value - middle) for value in logs)
    limit = max(
        middle + _DEVIATIONS * max(spread, _SMALLEST_SPREAD / _DEVIATIONS), middle + math.log(2)
    )
    found = [n for n, value in enumerate(values) if value > 0 and math.log(value) > limit]
    if len(found) > max(1.0, _FEW * len(logs)):
        return []
    return sorted(found, key=lambda n: -values[n])


def _layers_apart(layers: Sequence[Mapping[str, Any]]) -> Iterator[Advice]:
    found = []
    for kind, members in by_kind(layers).items():
        errors = [float(layer["relative_error"]) for layer in members]
        found += [(errors[n], median(errors), kind, members[n]) for n in outliers(errors)]
    found = [entry for entry in found if entry[0] >= _WORTH_A_LOOK]
    found.sort(key=lambda entry: -entry[0])
    for error, usual, kind, layer in found[:_SHOWN]:
        yield Advice(
            layer["name"],
            f"its error is {error:.2f} %; the median of all {kind} is {usual:.2f} %.",
            f"Save it with --save-layers '{layer['name']}' and replay it with prox24 solve: "
            "another method, damping or shrinkage may suit it better.",
        )


def _blocks_apart(blocks: Sequence[Mapping[str, Any]]) -> Iterator[Advice]:
    known = [block for block in blocks if block["relative_error"] is not None]
    errors = [float(block["relative_error"]) for block in known]
    for n in [n for n in outliers(errors) if errors[n] >= _WORTH_A_LOOK][:_SHOWN]:
        yield Advice(
            f"block {known[n]['block']}",
            f"its error is {errors[n]:.2f} %; the median block's is {median(errors):.2f} %.",
            "Look for the layer that causes it in the figures, and try more calibration text "
            "(--nsamples): the first and last blocks see inputs unlike the others'.",
        )


def _deviations(layers: Sequence[Mapping[str, Any]]) -> Iterator[Advice]:
    concerned: dict[str, list[str]] = {}
    for layer in layers:
        for what in layer["deviations"]:
            concerned.setdefault(what, []).append(layer["name"])
    for what, names in sorted(concerned.items()):
        yield Advice(
            names[0] if len(names) == 1 else f"{len(names)} layers, the first {names[0]}",
            f"done other than asked: {what}.",
            "More calibration text (--nsamples) or a larger --damping makes the problem "
            "better conditioned.",
        )


def _little_text(
    layers: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Iterator[Advice]:
    tokens = settings["nsamples"] * settings["seqlen"]
    full = [layer for layer in layers if layer["statistic"] == "full"]
    widest = max((int(layer["columns"]) for layer in full), default=0)
    if tokens < _TOKENS_PER_COLUMN * widest:
        wanted = math.ceil(_TOKENS_PER_COLUMN * widest / settings["seqlen"])
        yield Advice(
            "calibration",
            f"{tokens:,} tokens are few for layers with {widest:,} inputs: the second moments "
            "that the solver trusts are noisy.",
            f"Give more text: --nsamples {wanted} or more.",
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
            f"(as more than 1 % in {len(moving)} layers).",
            str(solver_class(worst["method"]).unsettled_advice),
        )


def _settings(settings: Mapping[str, Any]) -> Iterator[Advice]:
    method = settings["method"]
    if not solver_class(method).joint:
        yield Advice(
            f"--method {method}",
            "methods that look for the mask and the weights together lose less at 2:4.",
            "Try --method prox_admm, the default, on the same text.",
        )
    if solver_class(method).statistic != "none" and settings["refine"] == "none":
        yield Advice(
            "--refine none",
            "the kept weights were not adjusted to the mask that was found.",
            "Try --refine cg: it lowers the error of any method without changing the mask.",
        )
