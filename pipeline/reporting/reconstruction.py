"""The report's section on the reconstruction of blocks: words, a table, and the plot's data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.reconstruct.results import (
    PHASES,
    digits,
    exchange_in_words,
    kept_in_words,
    learned_errors,
    percent,
    totals,
    why_kept,
)

_NAMED = 4  # layers that were not trained
_TARGETS = {
    "dense-chain": "what the dense model has at this depth",
    "dense-block": "what the dense block gives for the same inputs",
}
OF_THE_SOLVE = (
    "The blocks were reconstructed after their solve: errors of layers here are those of the solve."
)


def in_words(results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """What the reconstruction did. results: totals of the blocks. settings: options of the job."""
    blocks, kept = results["blocks"], results["kept_solved"]
    text = (
        "After a block's layers were solved, its kept weights were trained for at most "
        f"{settings['reconstruct_epochs']} epochs, so that the block's output on the pruned "
        f"model's inputs is {_TARGETS[settings['reconstruct_target']]}."
        f"{exchange_in_words(settings['reconstruct_mask'])} A tenth of the calibration "
        "sequences took no part: their error decides which epoch is kept, and when to end."
    )
    if results["gain"]:
        change = f"{results['gain']:.1f} % lower"
        text += (
            f" In the mean of {blocks} block{'s' if blocks > 1 else ''} it is {change}: "
            f"{digits(results['after'])} % of the energy of a token, after "
            f"{digits(results['before'])} %."
        )
    if kept:
        text += f" Of {blocks} blocks {kept} keep{'s' if kept == 1 else ''} the solved weights."
    if results["not_finite"]:
        text += f" A loss was not finite in {results['not_finite']} of them."
    return text


def lead(blocks: Sequence[Mapping[str, Any]]) -> list[str]:
    """A paragraph for the top of the page; none where no block was reconstructed."""
    together = totals(block.get("reconstruct") for block in blocks)
    if together is None:
        return []
    came_to = "" if together["gain"] is None else f", by {together['gain']:.1f} % in the mean"
    return [
        "Then the kept weights of each block were trained, which lowered the error of the blocks' "
        f"outputs on sequences held out{came_to}."
        if together["kept_solved"] < together["blocks"]
        else "The reconstruction of the blocks was tried, but all keep their solved weights."
    ]


def section(blocks: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the template needs; `reconstruction` is None where no block was reconstructed.

    blocks: those of the summary. settings: the options of the job.
    """
    some = [block for block in blocks if block.get("reconstruct") is not None]
    together = totals(block["reconstruct"] for block in some)
    if together is None:
        return {"reconstruction": None}
    return {
        "reconstruction": {
            "words": in_words(together, settings),
            "of_the_solve": OF_THE_SOLVE,
            "header": [
                "block", "#before, %", "#after, %", "#change, %", "kept", "#epochs", "#seconds",
                "remark",
            ],
            "rows": [_row(block) for block in some],
            "untrained": list(_untrained(some)),
        }
    }  # fmt: skip


def output_errors(blocks: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Name of a line of the plot -> (block, error in per cent) of the reconstructed blocks.

    Errors of the sequences learned from are means over an epoch, while its steps change weights.
    """
    lines: dict[str, list[tuple[int, float]]] = {
        "held out, before": [],
        "held out, after": [],
        "learned from, first epoch": [],
        "learned from, kept epoch": [],
    }
    for block in blocks:
        result = block.get("reconstruct")
        if result is None:
            continue
        judged = (percent(result[name]) for name in ("before", "after"))
        errors = (*judged, *learned_errors(result))
        for points, error in zip(lines.values(), errors, strict=True):
            if error is not None:
                points.append((block["block"], error))
    return {name: points for name, points in lines.items() if points}


def _row(block: Mapping[str, Any]) -> tuple[Any, ...]:
    result = block["reconstruct"]
    before, after = (percent(result[name]) for name in ("before", "after"))
    shown = ["undefined" if error is None else digits(error) for error in (before, after)]
    change = "" if not before or after is None else f"{100 * (after / before - 1):.1f}"
    phases = block.get("phases", {})
    seconds = sum(float(phases[name]["seconds"]) for name in PHASES if name in phases)
    remark = why_kept(result) or ""
    return (
        block["block"],
        *shown,
        change,
        kept_in_words(result),
        result["epochs"],
        f"{seconds:.1f}",
        remark,
    )


def _untrained(blocks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each block with layers that were not trained."""
    for block in blocks:
        names = block["reconstruct"]["untrained"]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            yield f"block {block['block']}: {', '.join(names[:_NAMED])}{more}"
