"""What the report tells, gathered from the run directory: one row per layer, and what is beside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline.reporting.run_summary import kind_of
from pipeline.solvers.mask_counts import merged_groups


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A finished job.

    results: what `prox24.json` in its output says. summary: see
    `pipeline.records.summary.summarize`. manifest: `run.json`. status: `status.json`, empty where
    there is none. layers: see `layer_rows`.
    """

    run_directory: str
    results: Mapping[str, Any]
    summary: Mapping[str, Any]
    manifest: Mapping[str, Any]
    status: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]]

    @property
    def solver(self) -> Mapping[str, Any]:
        """The solver's settings, with its defaults filled in."""
        solver: Mapping[str, Any] = self.results["job"]["solver"]
        return solver

    @property
    def settings(self) -> Mapping[str, Any]:
        """The options that decide the result, as they were given."""
        settings: Mapping[str, Any] = self.results["job"]["settings"]
        return settings


def layer_rows(summary: Mapping[str, Any], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per pruned layer, in model order.

    The fields of `prox24.json`, with `rows` and `columns` for its shape, and `kind`: the layer's
    name with every number replaced by `*`. Of its mask (None where an older version made the block
    and counted nothing) `weights`, `kept`, `magnitude_too` and `groups` as in
    `pipeline.solvers.mask_counts.mask_counts`, and `magnitude_share`: the share of the kept
    weights, 0 to 1, that magnitude would also have kept. Of its inputs (None in the same way)
    `inputs_never`, `inputs_rarely`, `inputs_often` and `norm_correlation` as in
    `pipeline.solvers.mask_counts.column_pattern`.
    """
    masks = {block["block"]: block.get("masks", {}) for block in summary["blocks"]}
    rows = []
    for entry in results["layers"]:
        fields = {key: value for key, value in entry.items() if key != "shape"}
        mask = masks.get(entry["block"], {}).get(entry["layer"], {})
        counts = {key: mask.get(key) for key in ("weights", "kept", "magnitude_too", "groups")}
        columns = mask.get("columns", {})
        rows.append(
            {
                **fields,
                "kind": kind_of(entry["layer"]),
                "rows": entry["shape"][0],
                "columns": entry["shape"][1],
                **counts,
                "magnitude_share": share(counts["magnitude_too"], counts["kept"]),
                **{f"inputs_{key}": columns.get(key) for key in ("never", "rarely", "often")},
                "norm_correlation": columns.get("norm_correlation"),
            }
        )
    return rows


def share(part: int | None, whole: int | None) -> float | None:
    """part / whole; None where either is not known or there is no whole."""
    return None if part is None or not whole else part / whole


def distinct(layers: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    """The values that the layers have under `key`, each once, in model order."""
    return list(dict.fromkeys(layer[key] for layer in layers))


def by_kind(layers: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The layers of each kind, both in model order."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(layer["kind"], []).append(layer)
    return kinds


def kind_table(layers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per kind of layer: how many, shapes, median and worst relative error, and the mask's shares.

    Errors in per cent. `magnitude_share` is of all kept weights of the kind together, None where
    it is not known of each layer. `pattern` and `groups` are None and empty where the layers of
    the kind have several patterns (`--override`).
    """
    table = []
    for kind, members in by_kind(layers).items():
        worst = max(members, key=lambda layer: float(layer["relative_error"]))
        known = all(layer["kept"] is not None for layer in members)
        patterns = distinct(members, "pattern")
        table.append(
            {
                "kind": kind,
                "count": len(members),
                "shapes": list(dict.fromkeys(f"{m['rows']} × {m['columns']}" for m in members)),
                "median": median(float(layer["relative_error"]) for layer in members),
                "worst": float(worst["relative_error"]),
                "worst_block": worst["block"],
                "magnitude_share": share(
                    sum(layer["magnitude_too"] for layer in members) if known else None,
                    sum(layer["kept"] for layer in members) if known else None,
                ),
                "pattern": patterns[0] if len(patterns) == 1 else None,
                "groups": merged_groups(layer["groups"] for layer in members)
                if known and len(patterns) == 1
                else {},
            }
        )
    return table


def input_table(layers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per kind of layer whose masks' inputs were counted: which it prefers.

    `inputs`: of all its layers together; `never`, `rarely`, `often`: how many of these, as in
    `pipeline.solvers.mask_counts.column_pattern`. `correlation`: the median layer's, None where
    none is known.
    """
    table = []
    for kind, members in by_kind(layers).items():
        if any(layer["inputs_never"] is None for layer in members):
            continue
        known = [layer["norm_correlation"] for layer in members]
        known = [value for value in known if value is not None]
        table.append(
            {
                "kind": kind,
                "inputs": sum(layer["columns"] for layer in members),
                **{
                    name: sum(layer[f"inputs_{name}"] for layer in members)
                    for name in ("never", "rarely", "often")
                },
                "correlation": median(known) if known else None,
            }
        )
    return table


def positions_kept(groups: Mapping[str, int], keep: int) -> dict[str, float]:
    """How groups split over the positions they keep, as shares of all groups that sum to 1.

    Groups that keep fewer than `keep` positions are told together, under "fewer". Where there
    are more than eight ways, as in 4:8, the share of groups that keep each position, under its
    number from 1: these sum to `keep` at most. Empty where there are no groups.
    """
    total = sum(groups.values())
    if not total:
        return {}
    width = len(next(iter(groups)))
    if math.comb(width, keep) > 8:
        return {
            str(position + 1): sum(n for at, n in groups.items() if at[position] == "1") / total
            for position in range(width)
        }
    full = {at: n for at, n in sorted(groups.items(), reverse=True) if at.count("1") == keep}
    if fewer := total - sum(full.values()):
        full["fewer"] = fewer
    return {at: n / total for at, n in full.items()}


@dataclass(frozen=True)
class Pause:
    """Nothing was committed for long: the job was stopped, or work was lost. Times in seconds."""

    at: float
    seconds: float


def without_pauses(
    spans: Sequence[Mapping[str, Any]], longest: float
) -> tuple[list[dict[str, Any]], list[Pause]]:
    """The timeline from 0, gaps of more than `longest` seconds taken out, and those gaps.

    spans: by start (`pipeline.records.times.timeline`). A pause's `at` is in the times that are
    returned.
    """
    moved: list[dict[str, Any]] = []
    pauses: list[Pause] = []
    offset = end = float(spans[0]["start"]) if spans else 0.0
    for span in spans:
        start = float(span["start"])
        if start - end > longest:
            pauses.append(Pause(end - offset, start - end))
            offset += start - end
        moved.append({**span, "start": start - offset})
        end = max(end, start + float(span["seconds"]))
    return moved, pauses
