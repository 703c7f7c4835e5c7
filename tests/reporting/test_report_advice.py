"""What the report advises, and the figures behind it, on made-up jobs."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.reporting.advice import Advice, advise, outliers
from pipeline.reporting.layer_table import (
    input_table,
    kind_table,
    layer_rows,
    positions_kept,
    without_pauses,
)

SETTINGS = {"method": "prox_admm", "refine": "cg", "nsamples": 128, "seqlen": 2048}


def layer(block: int, kind: str = "mlp.up_proj", error: float = 2.0, **more: Any) -> dict[str, Any]:
    return {
        "name": f"model.layers.{block}.{kind}",
        "block": block,
        "layer": kind,
        "kind": kind,
        "rows": 64,
        "columns": 64,
        "relative_error": error,
        "method": "prox_admm",
        "pattern": "2:4",
        "statistic": "full",
        "support_change": 0.0,
        "deviations": [],
        "kept": 2048,
        "magnitude_too": 1024,
        "groups": {"1100": 512, "0011": 512},
        "dead_inputs": 0,
        "inputs_never": 0,
        "inputs_rarely": 1,
        "inputs_often": 2,
        "norm_correlation": 0.5,
        **more,
    }


def advice(layers: list[dict[str, Any]], measured: bool = True, **more: Any) -> list[Advice]:
    errors: dict[int, list[float]] = {}
    for entry in layers:
        errors.setdefault(entry["block"], []).append(entry["relative_error"])
    blocks = [{"block": b, "relative_error": max(own)} for b, own in errors.items()]
    settings = SETTINGS | more
    tokens = settings["nsamples"] * settings["seqlen"]
    return advise(layers, blocks, settings, tokens=tokens, measured=measured)


def test_a_job_without_anything_odd_gets_no_advice() -> None:
    layers = [layer(n, error=2 + 0.1 * (n % 5)) for n in range(12)]
    layers += [layer(n, "self_attn.q_proj", 0.5 + 0.05 * (n % 3)) for n in range(12)]
    assert advice(layers) == []


def test_a_layer_far_from_its_like_is_named_with_what_to_do() -> None:
    layers = [layer(n, error=9.0 if n == 5 else 2 + 0.1 * (n % 5)) for n in range(12)]
    first, block = advice(layers)
    assert first.subject == "model.layers.5.mlp.up_proj"
    assert "9.00 %" in first.finding
    assert "--save-layers 'model.layers.5.mlp.up_proj'" in first.remedy
    assert block.subject == "block 5"


def test_layers_are_held_against_their_own_kind() -> None:
    """All of one kind are ten times another's: none stands out."""
    layers = [layer(n, error=5 + 0.1 * n) for n in range(9)]
    layers += [layer(n, "self_attn.k_proj", 0.5 + 0.01 * n) for n in range(9)]
    assert advice(layers) == []


def test_errors_too_small_to_matter_are_let_be() -> None:
    assert advice([layer(n, error=0.9 if n == 3 else 0.01) for n in range(12)]) == []


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([1.0] * 7 + [100.0] * 1, [7]),
        ([1.0] * 6 + [100.0], []),  # too few to tell
        ([1.0] * 12 + [1.9], []),  # not even twice
        ([1.0, 0.0] * 20 + [50.0, 90.0], [41, 40]),
        ([1.0, 1.0, 1.0, 9.0] * 8, []),  # a quarter: no exceptions
        ([2.0**n for n in range(12)], []),  # widely spread, none apart
        ([], []),
    ],
)
def test_outliers(values: list[float], found: list[int]) -> None:
    assert outliers(values) == found


def test_little_text() -> None:
    (found,) = advice([layer(0, columns=4096)], nsamples=4, seqlen=2048)
    assert found.subject == "calibration"
    assert "--nsamples 8 " in found.remedy
    assert advice([layer(0, columns=4096)], nsamples=8, seqlen=2048) == []
    assert advice([layer(0, columns=4096, statistic="diagonal")], nsamples=4) == []


def test_what_was_done_other_than_asked_is_told_once() -> None:
    layers = [layer(n, deviations=["damping raised to 0.1"]) for n in (1, 2)] + [layer(3)]
    (found,) = advice(layers)
    assert found.subject == "2 layers, the first model.layers.1.mlp.up_proj"
    assert "damping raised to 0.1" in found.finding


def test_settings_that_leave_something_on_the_table() -> None:
    method, refine = advice([layer(0)], method="wanda", refine="none")
    assert "--method prox_admm" in method.remedy
    assert "--refine cg" in refine.remedy
    assert [a.subject for a in advice([layer(0)], method="magnitude", refine="none")] == [
        "--method magnitude"
    ]


def test_a_mask_that_had_not_settled() -> None:
    (found,) = advice([layer(0, method="prox", support_change=0.05)], method="prox")
    assert "--prox-growth" in found.remedy
    assert advice([layer(0, support_change=0.05)]) == []


def test_a_model_that_was_not_measured() -> None:
    (found,) = advice([layer(0)], measured=False)
    assert "prox24 eval" in found.remedy


def test_layers_of_a_kind_together() -> None:
    table = kind_table([layer(n, error=float(n)) for n in (1, 2, 6)])
    (row,) = table
    assert (row["count"], row["median"], row["worst"], row["worst_block"]) == (3, 2.0, 6.0, 6)
    assert row["magnitude_share"] == 0.5
    assert (row["pattern"], row["groups"]) == ("2:4", {"0011": 1536, "1100": 1536})
    other = layer(7, pattern="4:8", groups={"11110000": 512})
    (row,) = kind_table([layer(1), other])
    assert (row["pattern"], row["groups"], row["magnitude_share"]) == (None, {}, 0.5)


def test_inputs_of_a_kind_together() -> None:
    layers = [layer(0, dead_inputs=3), layer(1, norm_correlation=0.9, dead_inputs=1)]
    layers.append(layer(2, norm_correlation=None))
    old = layer(0, "self_attn.k_proj", inputs_never=None)
    assert input_table([*layers, old]) == [
        {
            "kind": "mlp.up_proj", "inputs": 192, "never": 0, "rarely": 3, "often": 6,
            "dead": 4, "correlation": 0.7,
        }
    ]  # fmt: skip
    (row,) = input_table([*layers, layer(3, dead_inputs=None)])  # of an older version
    assert row["dead"] is None
    (row,) = input_table([layer(0, norm_correlation=None)])
    assert row["correlation"] is None


def test_rows_of_blocks_whose_masks_were_not_counted() -> None:
    entry = {"name": "a.0.fc1", "block": 0, "layer": "fc1", "shape": [2, 4], "relative_error": 1.0}
    entry |= {"pattern": "2:4"}
    (row,) = layer_rows({"blocks": [{"block": 0}]}, {"layers": [entry]})
    assert (row["rows"], row["columns"], row["kept"], row["magnitude_share"]) == (2, 4, None, None)
    assert kind_table([row])[0]["magnitude_share"] is None
    assert input_table([row]) == []


def test_positions() -> None:
    assert positions_kept({"1100": 3, "0101": 4, "0001": 1}, 2) == {
        "1100": 3 / 8,
        "0101": 4 / 8,
        "fewer": 1 / 8,
    }
    assert positions_kept({}, 2) == {}
    many = positions_kept({"11110000": 3, "00001111": 1}, 4)
    assert many == {**dict.fromkeys("1234", 0.75), **dict.fromkeys("5678", 0.25)}


def test_pauses_are_taken_out_of_the_timeline() -> None:
    spans = [
        {"start": 1000.0, "seconds": 10.0},
        {"start": 1015.0, "seconds": 5.0},  # a short wait stays
        {"start": 9020.0, "seconds": 2.0},
    ]
    moved, pauses = without_pauses(spans, 60)
    assert [span["start"] for span in moved] == [0, 15, 20]
    assert [(pause.at, pause.seconds) for pause in pauses] == [(20, 8000)]
    assert without_pauses([], 60) == ([], [])
