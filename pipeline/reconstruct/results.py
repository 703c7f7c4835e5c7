"""What a block's record says of its reconstruction, and that in words. Imports no torch.

A result is a JSON object:

before, after: the error of the block's output on the held-out sequences, of the solved block and of
    what is kept; None where it was not finite. The error is that of `gradients.relative_error`: 1
    where the output is 0.
kept: "solved", or the number of the epoch, from 1; of a block in parts, how many epochs in all.
epochs: how many were run. held_out: the error before the first of them and after each. learned:
    the mean error of the other sequences during each. Those that were not finite are left out.
finite: whether all of them were.
untrained: layers that were not trained: experts with too few tokens. norms: how many weights and
    biases of norms were.
varying: operators of the backward whose kernels may round differently in every run.
parts: the same of each part, of a block that was trained in several.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

PHASES = (
    "dense", "begin_training", "begin_part", "train", "end_part", "end_training",
)  # fmt: skip
"""The phases of a block that reconstruct it, in their order."""

Result = Mapping[str, Any]


def result_of(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result in a block's record; None if it was not reconstructed.

    results: of the record.
    """
    result: dict[str, Any] | None = results.get("reconstruct")
    return result


def check_result(result: Any) -> None:
    """Raises ValueError, LookupError or TypeError unless it is such an object, or None."""
    if result is None:
        return
    kept, epochs, lists = result["kept"], result["epochs"], [*result["held_out"]]
    numbers = [result[name] for name in ("before", "after")]
    lists += [*result["learned"], *(number for number in numbers if number is not None)]
    counts = kept == "solved" or type(kept) is int
    counts = counts and type(epochs) is int and type(result["norms"]) is int
    known = all(type(number) in (int, float) and math.isfinite(number) for number in lists)
    names = [*result["untrained"], *result["varying"]]
    words = all(isinstance(name, str) for name in names)
    if not (counts and known and words and isinstance(result["finite"], bool)):
        raise ValueError("the result of a reconstruction")


def percent(error: float | None) -> float | None:
    """An error in per cent."""
    return None if error is None else 100 * error


def output_error(result: Result | None) -> tuple[float, float] | None:
    """The held-out error of the block's output in per cent, before and after its reconstruction.

    None for a block that was not reconstructed, and where it is undefined.
    """
    if result is None:
        return None
    before, after = (percent(result[name]) for name in ("before", "after"))
    return None if before is None or after is None else (before, after)


def digits(error: float) -> str:
    """Three significant digits: `12.3`, `0.900`."""
    return f"{error:#.3g}".rstrip(".")


def gain(pairs: Iterable[tuple[float, float]]) -> float | None:
    """By how many per cent errors fell, the mean over blocks; None without any.

    pairs: before and after. A block whose error was 0 gained nothing.
    """
    gains = [100 * (1 - after / before) if before else 0.0 for before, after in pairs]
    return fmean(gains) if gains else None


def totals(results: Iterable[Result | None]) -> dict[str, Any] | None:
    """The reconstructed blocks together; None where there is none.

    blocks: their number. kept_solved: how many keep their solved weights. not_finite: how many had
    a loss that was not finite. untrained: number of layers that were not trained. norms: of weights
    and biases of norms that were. epochs: of all blocks. before, after: means of `output_error`;
    gain: see `gain`; None where undefined.
    """
    some = [result for result in results if result is not None]
    if not some:
        return None
    pairs = [pair for pair in map(output_error, some) if pair is not None]
    return {
        "blocks": len(some),
        "kept_solved": sum(result["kept"] == "solved" for result in some),
        "not_finite": sum(not result["finite"] for result in some),
        "untrained": sum(len(result["untrained"]) for result in some),
        "norms": sum(result["norms"] for result in some),
        "epochs": sum(result["epochs"] for result in some),
        "before": fmean(before for before, _ in pairs) if pairs else None,
        "after": fmean(after for _, after in pairs) if pairs else None,
        "gain": gain(pairs),
    }


def kept_in_words(result: Result) -> str:
    """`solved`, `epoch 3`, or of a block in parts `5 epochs`."""
    kept = result["kept"]
    if kept == "solved":
        return "solved"
    return f"{kept} epochs" if "parts" in result else f"epoch {kept}"


def exchange_in_words(mask: str) -> str:
    """What `--reconstruct-mask` let weights do, a sentence after a space; "" for `fixed`."""
    if mask == "fixed":
        return ""
    return " In the first 60 % of the steps pruned weights could take the places of kept ones."


def learned_errors(result: Result) -> tuple[float | None, float | None]:
    """The errors of the sequences learned from, in the first epoch and in the one that is kept.

    In per cent, as `percent`. None where there was none.
    """
    last = result["parts"][-1] if result.get("parts") else result
    learned, kept = result["learned"], last["kept"]
    first = learned[0] if learned else None
    at_end = None if kept == "solved" else last["learned"][kept - 1]
    return percent(first), percent(at_end)


def why_kept(result: Result) -> str | None:
    """Why a block keeps weights other than asked; None where nothing is out of the ordinary."""
    kept = result["kept"]
    keeps = f"it keeps its {'solved' if kept == 'solved' else 'best'} weights"
    if not result["finite"]:
        if result["before"] is None:
            return (
                "not reconstructed: the error of the solved block's output is not finite on the "
                "held-out sequences"
            )
        return (
            f"a loss of its reconstruction is not finite: {keeps}; a lower --reconstruct-lr may "
            "help"
        )
    if kept == "solved" and result["epochs"]:
        return f"no epoch of its reconstruction lowered the held-out error: {keeps}"
    return None


def notes(result: Result | None, name: str) -> list[str]:
    """A line for each thing out of the ordinary in the reconstruction of the block `name`."""
    if result is None:
        return []
    why, layers = why_kept(result), result["untrained"]
    lines = [] if why is None else [f"{name}: {why}"]
    if layers:
        more = f" and {len(layers) - 1} more" if layers[1:] else ""
        lines.append(
            f"{name}.{layers[0]}{more}: not reconstructed: experts with too few tokens keep their "
            "solved weights (--expert-tokens, --nsamples)"
        )
    if result["varying"]:
        lines.append(
            f"{name}: its reconstruction may differ in the last digits from run to run: "
            f"{', '.join(result['varying'])} on this device; --attn-implementation eager may help"
        )
    return lines
