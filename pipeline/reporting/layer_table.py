"""The data of the report, from the run directory: one row per layer, and tables by kind."""

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
    """All records of a finished job that the report is made from.

    results: `prox24.json` of the output. summary: see `pipeline.records.summary.summarize`.
    manifest: `run.json`. status: `status.json`, empty where there is none. layers: see
    `layer_rows`.
    """

    run_directory: str
    results: Mapping[str, Any]
    summary: Mapping[str, Any]
    manifest: Mapping[str, Any]
    status: Mapping[str, Any]
    layers: Sequence[Mapping[str, Any]]

    @property
    def solver(self) -> Mapping[str, Any]:
        """The settings of the solver, with defaults filled in."""
        solver: Mapping[str, Any] = self.results["job"]["solver"]
        return solver

    @property
    def settings(self) -> Mapping[str, Any]:
        """The options that determine the result, as given by the user."""
        settings: Mapping[str, Any] = self.results["job"]["settings"]
        return settings

    @property
    def counted_tokens(self) -> int | None:
        """How many calibration tokens the statistics are taken of; None for all of them."""
        # Older versions recorded nothing of the text.
        count: int | None = self.results.get("text", {}).get("counted_tokens")
        return count

    @property
    def tokens(self) -> int:
        """Number of calibration tokens that the statistics are taken of."""
        settings = self.settings
        return self.counted_tokens or int(settings["nsamples"]) * int(settings["seqlen"])


def layer_rows(summary: Mapping[str, Any], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per pruned layer, in model order.

    A row has the fields of `prox24.json`, with `rows` and `columns` in place of the shape, and:
    - `kind`: see `kind_of`;
    - `weights`, `kept`, `magnitude_too` and `groups`: see `pipeline.solvers.mask_counts`;
    - `magnitude_share`: the share of the kept weights, 0 to 1, that magnitude pruning keeps, too;
    - `dead_inputs`: see `pipeline.solvers.types.SolveReport`; None where it was not counted;
    - `inputs_never`, `inputs_rarely`, `inputs_often` and `norm_correlation`: see
      `pipeline.solvers.mask_counts.column_pattern`.
    Counts are None where an older version pruned the block and did not count.
    """
    masks = {block["block"]: block.get("masks", {}) for block in summary["blocks"]}
    rows = []
    for entry in results["layers"]:
        fields = {"dead_inputs": None, "products": "float32", **entry}
        del fields["shape"]
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


def error_of(layer: Mapping[str, Any]) -> float:
    """The relative error of a layer in percent; inf where it is undefined."""
    error = layer["relative_error"]
    return math.inf if error is None else float(error)


def share(part: int | None, whole: int | None) -> float | None:
    """part / whole; None where either is unknown or the whole is 0."""
    return None if part is None or not whole else part / whole


def distinct(layers: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    """The distinct values of the layers under `key`, in model order."""
    return list(dict.fromkeys(layer[key] for layer in layers))


def by_kind(layers: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The layers of each kind, both in model order."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(layer["kind"], []).append(layer)
    return kinds


def kind_table(layers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per kind of layer: count, shapes, median and worst error, and counts of the masks.

    Errors are in percent, inf where they are undefined. `magnitude_share` is that of all layers of
    the kind together; None where it is unknown for a layer. `pattern` is None and `groups` empty
    where the layers of the kind have different patterns (`--override`).
    """
    table = []
    for kind, members in by_kind(layers).items():
        worst = max(members, key=error_of)
        known = all(layer["kept"] is not None for layer in members)
        patterns = distinct(members, "pattern")
        table.append(
            {
                "kind": kind,
                "count": len(members),
                "shapes": list(dict.fromkeys(f"{m['rows']} × {m['columns']}" for m in members)),
                "median": median(map(error_of, members)),
                "worst": error_of(worst),
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
    """One row per kind of layer: how evenly its masks keep the inputs, where that was counted.

    `inputs`: number of inputs of all layers of the kind. `never`, `rarely`, `often`: how many of
    these are kept so often; see `pipeline.solvers.mask_counts.column_pattern`. `dead`: how many are
    0 in all calibration tokens, None where that was not counted. `correlation`: the median of the
    layers' `norm_correlation`; None where none is known.
    """
    table = []
    for kind, members in by_kind(layers).items():
        if any(layer["inputs_never"] is None for layer in members):
            continue
        dead = [layer["dead_inputs"] for layer in members]
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
                "dead": None if None in dead else sum(dead),
                "correlation": median(known) if known else None,
            }
        )
    return table


def positions_kept(groups: Mapping[str, int], keep: int) -> dict[str, float]:
    """Set of kept positions -> its share of all groups; the shares sum to 1.

    Groups that keep fewer than `keep` positions are counted as "fewer". Where there are more than
    eight sets, as in 4:8: position, from "1" on, -> the share of groups that keep it; these shares
    sum to at most `keep`. Empty where there are no groups.
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
    """A time without committed work: the job was stopped, or work was lost. In seconds."""

    at: float
    seconds: float


def without_pauses(
    spans: Sequence[Mapping[str, Any]], longest: float
) -> tuple[list[dict[str, Any]], list[Pause]]:
    """The timeline, starting at 0, without gaps of more than `longest` seconds; and these gaps.

    spans: ordered by start (see `pipeline.records.times.timeline`). `Pause.at` refers to the
    returned timeline.
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
