"""The model card: its front matter, its figures, and that it says nothing of time and place."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml

from pipeline.output.model_card import model_card
from pipeline.solvers.types import SolveReport

SETTINGS: dict[str, Any] = {
    "method": "prox_admm",
    "pattern": "2:4",
    "dataset": "allenai/c4",
    "text_column": None,
    "nsamples": 128,
    "seqlen": 2048,
    "seed": 0,
    "damping": 0.01,
    "shrinkage": 0.0,
    "blocksize": 128,
    "refine": "cg",
    "refine_steps": 20,
    "batch_size": 4,
}
REPORT = SolveReport(
    method="prox_admm",
    pattern="2:4",
    rows=8,
    objective_zero=100.0,
    objective_before=3.0,
    objective=2.0,
    relative_error=2.0,
    statistic="full",
    tokens=64,
    iterations=140,
    support_change=0.0,
    refine="cg",
    refine_steps=20,
    rows_kept_unrefined=0,
    damping=0.01,
    shrinkage=0.0,
)


def layer(block: int, kind: str, error: float | None, **changes: Any) -> dict[str, Any]:
    report = dataclasses.replace(REPORT, relative_error=error, **changes)
    name = f"model.layers.{block}.{kind}"
    facts = {"name": name, "block": block, "layer": kind, "shape": [8, 16]}
    return {**facts, **report.to_json()}


RESULTS = [
    layer(block, kind, error)
    for block, (q, down) in enumerate([(1.0, 4.0), (2.0, 9.5), (6.0, 5.0)])
    for kind, error in (("self_attn.q_proj", q), ("mlp.down_proj", down))
]


def card(**changes: Any) -> str:
    arguments: dict[str, Any] = {
        "source_name": "org/Model-1B",
        "settings": SETTINGS,
        "results": RESULTS,
        "skipped": {},
        "perplexity": None,
        "dense": {},
        "license": "apache-2.0",
    }
    return model_card(**(arguments | changes))


def test_layers_that_were_not_pruned_are_listed_by_reason() -> None:
    reason = "a forward of text does not reach this block"
    skipped = {f"model.layers.{b}.mlp.experts.{e}.up": reason for b in (1, 3) for e in (0, 1)}
    text = card(skipped=skipped | {"model.layers.0.q": "--exclude .*\\.q"})
    assert f"- {reason}: `model.layers.*.mlp.experts.*.up` (4)\n" in text
    assert "- --exclude .*\\.q: `model.layers.*.q` (1)\n" in text
    assert "were not pruned:" not in card()


def front_matter(text: str) -> dict[str, Any]:
    start, fields, _ = text.split("---\n", 2)
    assert start == ""
    return dict(yaml.safe_load(fields))


def rows(text: str) -> dict[str, list[str]]:
    """Every table row of the card by its first cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {line[0].strip("`"): line[1:] for line in cells}


def test_the_front_matter_is_what_the_hub_reads() -> None:
    fields = front_matter(card())
    assert fields["base_model"] == "org/Model-1B"
    assert fields["license"] == "apache-2.0"
    assert fields["library_name"] == "transformers"
    assert {"prox24", "pruning", "2:4"} <= set(fields["tags"])


@pytest.mark.parametrize(
    ("declared", "shown"),
    [(None, None), ('"mit"', "mit"), ("mit  # see below", "mit"), ("[a, b]", None), ("{", None)],
)
def test_only_a_plain_license_is_passed_on(declared: str | None, shown: str | None) -> None:
    assert front_matter(card(license=declared)).get("license") == shown


@pytest.mark.parametrize("name", ["model", "my model", "a/b/c", "-x", "a: b", "weird|name`"])
def test_a_source_that_is_no_hub_id_is_no_base_model(name: str) -> None:
    text = card(source_name=name)
    assert "base_model" not in front_matter(text)
    assert "pruned to 2:4" in text


def test_errors_are_summed_up_by_kind_of_layer() -> None:
    table = rows(card())
    assert table["self_attn.q_proj"] == ["8 × 16", "3", "3.000", "6.000", "2"]
    assert table["mlp.down_proj"] == ["8 × 16", "3", "6.167", "9.500", "1"]


def test_the_worst_layers_come_first() -> None:
    text = card()
    worst = text[text.index("largest error") :]
    names = [key for key in rows(worst) if key.startswith("model.")]
    errors = {result["name"]: result["relative_error"] for result in RESULTS}
    assert names == sorted(errors, key=errors.__getitem__, reverse=True)[:5]


def test_the_settings_are_shown_and_what_is_unset_is_not() -> None:
    table = rows(card())
    assert table["method"] == ["`prox_admm`"]
    assert table["calibration text"] == ["`allenai/c4`"]
    assert table["calibration sequences"] == ["`128`"]
    assert table["shrinkage"] == ["`0.0`"]
    assert "text column" not in table


def test_settings_that_the_method_does_not_use_are_left_out() -> None:
    assert "blocksize" not in rows(card())
    assert "refinement steps" in rows(card())
    table = rows(card(settings=SETTINGS | {"method": "sparsegpt", "refine": "none"}))
    assert table["blocksize"] == ["`128`"]
    assert "refinement steps" not in table


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("2:4", "of every 4 consecutive weights at most 2 are not zero"),
        ("4:8", "of every 8 consecutive weights at most 4 are not zero"),
        ("unstructured:0.6", "60 % zeros in each layer"),
    ],
)
def test_the_pattern_is_said_in_words(pattern: str, words: str) -> None:
    text = card(settings=SETTINGS | {"pattern": pattern})
    assert words in text
    assert pattern in front_matter(text)["tags"]


@pytest.mark.parametrize(
    ("statistic", "formula"), [("full", "H ΔWᵀ"), ("diagonal", "D ΔWᵀ"), ("none", "‖ΔW‖²")]
)
def test_the_error_shown_is_the_one_measured(statistic: str, formula: str) -> None:
    text = card(results=[layer(0, "fc1", 5.0, statistic=statistic)])
    assert formula in text
    for other in {"H ΔWᵀ", "D ΔWᵀ", "‖ΔW‖²"} - {formula}:
        assert other not in text


def test_perplexity_if_it_was_measured() -> None:
    assert "Not measured" in card()
    measured = {"perplexity": 32.1234, "tokens": 20480, "seqlen": 1024, "dataset": "text.txt"}
    text = card(perplexity=measured)
    assert "Not measured" not in text
    assert rows(text)["this model"] == ["32.123"]
    assert "20,480 tokens in sequences of 1024" in text
    assert "dense" not in rows(text)
    assert rows(card(perplexity=measured | {"dense": 19.8}))["dense"] == ["19.800"]


def test_deviations_are_confessed() -> None:
    assert "other than asked" not in card()
    changed = [layer(n, "fc1", 1.0, deviations=("damping raised",)) for n in range(3)]
    names = [f"`model.layers.{n}.fc1`" for n in range(6)]
    assert f"- damping raised (3 layers: {', '.join(names[:3])})\n" in card(results=changed)
    assert f"- damping raised ({names[0]})\n" in card(results=changed[:1])
    changed = [layer(n, "fc1", 1.0, deviations=("damping raised",)) for n in range(6)]
    assert f"- damping raised (6 layers: {', '.join(names[:4])}, ...)\n" in card(results=changed)


def test_inputs_that_were_always_0_are_counted() -> None:
    assert "were 0" not in card()
    results = [layer(n, "fc1", 1.0, dead_inputs=4 * n) for n in range(3)]
    sentence = "12 of all 48 inputs of these layers, in 2 of them, were 0 on all of the calibration"
    assert sentence in card(results=results)


@pytest.mark.parametrize("error", [None, float("inf")])
def test_an_undefined_error_is_called_so(error: float | None) -> None:
    text = card(results=[layer(0, "fc1", error), layer(1, "fc1", 1.0)])
    assert rows(text)["model.layers.0.fc1"] == ["undefined"]


def test_the_card_depends_on_its_arguments_alone() -> None:
    timed = [result | {"seconds": 12.5, "host": "node-7"} for result in RESULTS]
    placed = SETTINGS | {"run_dir": "/scratch/job", "workers": 8}
    assert card(results=timed, settings=placed) == card()


def test_a_model_without_pruned_layers_has_a_card() -> None:
    assert "0 linear layers" in card(results=[])


def test_weights_that_stay_dense_are_named_with_the_reason() -> None:
    dense = {f"model.layers.{b}.mlp.gate.weight": "it chooses the experts" for b in range(12)}
    text = card(dense=dense | {"model.layers.3.conv.weight": "it mixes no channels"})
    assert "- `model.layers.*.mlp.gate.weight (12)`: it chooses the experts\n" in text
    assert "- `model.layers.*.conv.weight (1)`: it mixes no channels\n" in text
    assert "Left dense" not in card()
