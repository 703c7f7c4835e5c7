"""Where the reconstruction of blocks is seen: report, result, card, comparison, sweep, status."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch
import yaml
from transformers import AutoModelForCausalLM

from cluster.command_line import run
from cluster.console import Console
from pipeline.reconstruct.results import (
    check_result,
    digits,
    learned_errors,
    notes,
    output_error,
    totals,
)
from pipeline.records.summary import _work
from pipeline.reporting.advice import advise
from pipeline.reporting.reconstruction import output_errors, section
from pipeline.runtime.progress import counted
from storage.run.checkpoints import BlockRecord
from tests.support.jobs import check_output, prune_here, write_text
from tests.support.processes import Driver
from tests.support.tiny_models import save_tiny_model

BLOCKS, SEQUENCES = 2, 20
JOB: dict[str, Any] = {"nsamples": SEQUENCES, "reconstruct": "block", "reconstruct_epochs": 3}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `block` reconstructed from it, `none`, and `wild` of a huge rate."""
    folder = tmp_path_factory.mktemp("reconstructed")
    model = save_tiny_model(folder / "model", blocks=BLOCKS)
    write_text(folder / "text.txt")
    prune_here(model, folder / "block", no_report=False, **JOB)
    prune_here(model, folder / "none", nsamples=SEQUENCES, reconstruct="none")
    arguments = ["prune", model, folder / "wild", "--dataset", folder / "text.txt"]
    arguments += ["--executor=local", "--threads=1", "--seqlen=32", "--batch-size=2"]
    arguments += [f"--nsamples={SEQUENCES}", "--reconstruct=block", "--reconstruct-lr=1e30"]
    driver = Driver(arguments, folder / "wild.log")
    assert driver.wait() == 0, driver.errors()
    return folder


def result(**changes: Any) -> dict[str, Any]:
    """A block whose second of three epochs is kept."""
    whole = {
        "before": 0.02, "after": 0.015, "kept": 2, "epochs": 3,
        "held_out": [0.02, 0.0175, 0.015, 0.016], "learned": [0.03, 0.025, 0.0225], "finite": True,
        "untrained": [], "norms": 0,
        "varying": [],
    }  # fmt: skip
    return whole | changes


def summary(folder: Path, name: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / f"{name}.run/report/summary.json").read_text())
    return read


def words(folder: Path, name: str) -> str:
    """The text of a report."""
    page = (folder / f"{name}.run/report/report.html").read_text()
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


# -- whole jobs ----------------------------------------------------------------------------------


def test_the_output_says_whether_and_how(jobs: Path) -> None:
    plain, trained = (
        json.loads((jobs / name / "prox24.json").read_text()) for name in ("none", "block")
    )
    assert plain["reconstruction"] is None
    assert all("reconstruct" not in block for block in plain["blocks"])
    assert "not trained further" in (jobs / "none/README.md").read_text()
    assert "econstruct" not in (jobs / "none/README.md").read_text()

    assert trained["job"]["settings"]["reconstruct_epochs"] == 3
    blocks = [block["reconstruct"] for block in trained["blocks"]]
    assert trained["reconstruction"] == summary(jobs, "block")["reconstruction"] == totals(blocks)
    assert trained["reconstruction"]["gain"] > 0
    card = (jobs / "block/README.md").read_text()
    assert "| reconstruction epochs, at most | `3` |" in card
    assert f"{trained['reconstruction']['gain']:.2f} % |" in card
    assert "those of the solve, before the reconstruction" in card


@pytest.mark.parametrize("name", ["block", "wild"])
def test_the_output_is_sound(jobs: Path, name: str) -> None:
    check_output(jobs / "model", jobs / name)
    assert run(["verify", str(jobs / name), "--source", str(jobs / "model")]) == 0


def test_the_masks_that_were_counted_are_those_of_the_output(jobs: Path) -> None:
    tensors = AutoModelForCausalLM.from_pretrained(jobs / "block").state_dict()
    for block in summary(jobs, "block")["blocks"]:
        for layer, mask in block["masks"].items():
            weight = tensors[f"model.layers.{block['block']}.{layer}.weight"]
            assert int((weight != 0).sum()) == mask["kept"]


def test_the_report_has_a_section(jobs: Path) -> None:
    text = words(jobs, "block")
    together = summary(jobs, "block")["reconstruction"]
    for said in (
        "trained for at most 3 epochs",
        f"it is {together['gain']:.1f} % lower",
        "errors of layers here are those of the solve",
        "block before, % after, % change, % kept epochs seconds remark",
        *(
            f"{digits(error)} "
            for block in summary(jobs, "block")["blocks"]
            for error in output_error(block["reconstruct"]) or ()
        ),
        "training in the reconstruction of blocks",
    ):
        assert said in text, said
    page = (jobs / "block.run/report/report.html").read_text()
    assert page.count("<img") == 6  # one more than without


def test_a_loss_that_is_not_finite_ends_in_the_solved_weights_and_is_said(jobs: Path) -> None:
    wild = summary(jobs, "wild")
    assert wild["reconstruction"]["kept_solved"] == BLOCKS
    assert wild["reconstruction"]["not_finite"] == BLOCKS
    assert wild["reconstruction"]["gain"] == 0
    log = (jobs / "wild.log.err").read_text()
    for block in range(BLOCKS):
        line = f"model.layers.{block}: a loss of its reconstruction is not finite: it keeps its"
        assert f"{line} solved weights; a lower --reconstruct-lr may help" in log
    assert re.search(r"block 1/2 done in .* error \S+%  output error (\S+) -> \1%  eta", log)
    text = words(jobs, "wild")
    assert f"Of {BLOCKS} blocks {BLOCKS} keep the solved weights." in text
    assert f"a loss was not finite in {BLOCKS} of {BLOCKS} blocks" in text  # in the advice
    card = (jobs / "wild/README.md").read_text()
    assert f"Blocks that keep their solved weights: {BLOCKS}." in card
    # The first block's inputs do not depend on others: its weights are those without any.
    plain, tried = (
        AutoModelForCausalLM.from_pretrained(jobs / name).state_dict() for name in ("none", "wild")
    )
    first = [name for name in plain if ".layers.0." in name]
    assert first
    assert all(torch.equal(plain[name], tried[name]) for name in first)


def test_compare_and_status_show_it(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["compare", *(str(jobs / name) for name in ("none", "block", "wild")), "--json"]) == 0
    )
    none, block, wild = json.loads(capsys.readouterr().out)["runs"]
    assert (none["reconstruct"], block["reconstruct"]) == ("none", "block")
    assert none["output_error before"] is None
    assert block["output_error before"] > block["output_error after"] > 0
    assert wild["blocks kept solved"] == BLOCKS
    assert run(["status", str(jobs / "block"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["blocks"]["committed"]
    for entry, known in zip(shown, summary(jobs, "block")["blocks"], strict=True):
        pair = output_error(known["reconstruct"])
        assert pair == (entry["output_error"]["before"], entry["output_error"]["after"])
    assert run(["status", str(jobs / "none"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"]["committed"][0]["output_error"] is None


def test_a_sweep_of_the_option(jobs: Path, tmp_path: Path) -> None:
    text = str(jobs / "text.txt")
    wanted = {
        "model": str(jobs / "model"),
        "folder": str(tmp_path / "sweep"),
        "prune": {
            "executor": "local", "threads": 1, "dataset": text, "seqlen": 24, "nsamples": 6,
            "no_report": True,
        },
        "eval": {"dataset": text, "seqlen": 16, "nsamples": 4},
        "vary": {"reconstruct": ["none", "block"]},
    }  # fmt: skip
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(wanted))
    assert run(["sweep", "--config", str(file)]) == 0
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as table:
        rows = {row["run"]: row for row in csv.DictReader(table)}
    assert list(rows) == ["dense", "reconstruct=none", "reconstruct=block"]
    assert rows["reconstruct=none"]["output_error after"] == ""
    trained = rows["reconstruct=block"]
    assert 0 < float(trained["output_error after"]) <= float(trained["output_error before"])
    assert trained["perplexity"] != rows["reconstruct=none"]["perplexity"]


# -- words and figures ---------------------------------------------------------------------------


def test_shares_and_totals() -> None:
    whole = result()
    assert output_error(whole) == (2.0, 1.5)
    assert learned_errors(whole) == (3.0, 2.5)
    kept = result(after=0.02, kept="solved")
    assert learned_errors(kept) == (3.0, None)
    assert totals([None, None]) is None
    together = totals([whole, None, kept])
    assert together is not None
    assert (together["blocks"], together["kept_solved"], together["epochs"]) == (2, 1, 6)
    assert (together["before"], together["after"], together["gain"]) == (2.0, 1.75, 12.5)


def test_without_an_error_nothing_is_claimed() -> None:
    silent = result(before=None, after=None)
    assert output_error(silent) is None
    together = totals([silent])
    assert together is not None
    assert together["gain"] is together["before"] is None
    rows = section([{"block": 0, "reconstruct": silent}], SETTINGS)["reconstruction"]["rows"]
    assert rows[0][1:4] == ("undefined", "undefined", "")


SETTINGS = {
    "reconstruct_epochs": 3,
    "reconstruct_target": "dense-chain",
    "reconstruct_mask": "fixed",
}


def test_a_block_in_parts() -> None:
    first = result()
    second = result(before=0.015, after=0.0125, kept=1, learned=[0.02, 0.019], epochs=2)
    parts = result(after=0.0125, kept=3, learned=[*first["learned"], *second["learned"]], epochs=5)
    parts["parts"] = [first, second]
    assert learned_errors(parts) == (3.0, 2.0)
    rows = section([{"block": 4, "reconstruct": parts}], SETTINGS)["reconstruction"]["rows"]
    assert rows == [(4, "2.00", "1.25", "-37.5", "3 epochs", 5, "0.0", "")]
    lines = output_errors([{"block": 3, "reconstruct": None}, {"block": 4, "reconstruct": parts}])
    assert lines["held out, after"] == [(4, 1.25)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        # All of its layers are experts' with too few tokens: the line below says so.
        (
            {
                "kept": "solved",
                "epochs": 0,
                "before": None,
                "after": None,
                "untrained": ["e.1.up"],
                "norms": 0,
            },
            ["model.layers.7.e.1.up: not reconstructed: experts with too few tokens"],
        ),
        (
            {"kept": "solved", "after": 0.02},
            ["no epoch of its reconstruction lowered the held-out"],
        ),
        ({"finite": False}, ["a loss of its reconstruction is not finite: it keeps its best"]),
        (
            {"finite": False, "before": None, "after": None, "kept": "solved", "epochs": 0},
            ["not reconstructed: the error of the solved block's output is not finite"],
        ),
        (
            {"untrained": ["mlp.experts.1.up", "mlp.experts.2.up"]},
            [".mlp.experts.1.up and 1 more: not reconstructed: experts with too few tokens"],
        ),
    ],
)
def test_what_is_out_of_the_ordinary_has_a_line(changes: dict[str, Any], said: list[str]) -> None:
    lines = notes(result(**changes), "model.layers.7")
    assert len(lines) == len(said)
    for line, part in zip(lines, said, strict=True):
        assert line.startswith("model.layers.7")
        assert part in line


def test_experts_that_were_not_trained_are_named() -> None:
    untrained = [f"mlp.experts.{n}.up_proj" for n in range(6)]
    shown = section([{"block": 1, "reconstruct": result(untrained=untrained)}], SETTINGS)
    named = ", ".join(untrained[:4])
    assert shown["reconstruction"]["untrained"] == [f"block 1: {named} and 2 more"]


@pytest.mark.parametrize("changes", [{"kept": "x"}, {"before": math.nan}, {"learned": ["1"]}])
def test_a_result_of_another_kind_is_refused(changes: dict[str, Any]) -> None:
    check_result(result())
    with pytest.raises(ValueError, match="reconstruction"):
        check_result(result(**changes))


def test_advice_where_most_blocks_gained_nothing() -> None:
    kept = {"block": 0, "relative_error": 1.0, "reconstruct": result(kept="solved", after=2.0)}
    settings = {"method": "prox_admm", "refine": "cg", "nsamples": 8, "seqlen": 32}
    (advice,) = advise([], [kept], settings, tokens=256, measured=True)
    assert "1 of 1 blocks keep their solved weights" in advice.finding
    assert "--reconstruct-lr" in advice.remedy


def test_work_that_was_resumed_with_other_workers_is_theirs() -> None:
    old, new = [{"pid": 1}, {"pid": 2}], [{"pid": 3}]
    results = {"workers": new, "solve_workers": old, "phases": {"solve": {}, "train": {}}}
    record = BlockRecord(block=5, attempt=1, world=1, files=(), layers={}, results=results)
    solved, trained = _work(record)
    assert (list(solved.phases), solved.workers) == (["solve"], old)
    assert (list(trained.phases), trained.workers) == (["train"], new)


# -- the console ---------------------------------------------------------------------------------


def test_epochs_are_told_now_and_then_and_the_time_left_does_not_jump(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four seconds an epoch, and at least ten between two lines."""
    now = 0.0
    monkeypatch.setattr("cluster.console.time.monotonic", lambda: now)
    console = Console()
    err = io.StringIO()
    console.console = rich.console.Console(file=err, width=80)
    console.begin("pruning", 3, 0)
    left = []
    for block in range(2):
        for epoch in range(6):
            console.phase(f"reconstruct {epoch + 1}/6", block)
            left.append(console._left())
            now += 4
        console.block_done(block, 9.5, (1.2, 0.9))
    console.end()
    assert err.getvalue().splitlines() == [
        "block 1/3: reconstruct 4/6",
        "block 1/3 done in 24.0 s  error 9.500%  output error 1.20 -> 0.900%  eta 0:48",
        "block 2/3: reconstruct 4/6",
        "block 2/3 done in 24.0 s  error 9.500%  output error 1.20 -> 0.900%  eta 0:24",
    ]
    assert left == [None] * 6 + [48, 44, 40, 36, 32, 28]


@pytest.mark.parametrize("phase", ["solve", "read text", "reconstruct", "3/8"])
def test_phases_without_a_number(phase: str) -> None:
    assert counted(phase) is None
    assert counted("reconstruct 3/8") == ("reconstruct", 3, 8)
