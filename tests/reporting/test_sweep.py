"""`prox24 sweep`: many jobs, one table; resumed where it stopped."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline.sweep.run
from cluster.command_line import run
from pipeline.records.evaluation import read_evaluation
from pipeline.sweep.grid import folder_name, read_plan
from pipeline.sweep.plots import Line, Panel, draw, positions
from storage.errors import ConfigError, NumericalError
from storage.run.directory import RunDirectory
from tests.support.jobs import contents, write_text
from tests.support.tiny_models import save_tiny_model

LINES = {
    "wanda": {"method": "wanda"},
    "sparsegpt+gd": {"method": "sparsegpt", "refine": "gradient", "refine_steps": 20},
}


@pytest.fixture
def wanted(tmp_path: Path) -> dict[str, Any]:
    """A sweep of two lines and two numbers of steps on a tiny model, as its YAML file says it."""
    save_tiny_model(tmp_path / "model")
    text = str(write_text(tmp_path / "text.txt"))
    runtime = {"executor": "local", "threads": 1, "batch_size": 2, "no_report": True}
    return {
        "model": str(tmp_path / "model"),
        "folder": str(tmp_path / "sweep"),
        "prune": {**runtime, "dataset": text, "seqlen": 24},
        "eval": {"dataset": text, "seqlen": 16, "nsamples": 5},
        "lines": {name: dict(options) for name, options in LINES.items()},
        "vary": {"nsamples": [3, 6]},
    }


@pytest.fixture
def quick(wanted: dict[str, Any]) -> dict[str, Any]:
    """Three runs that need no calibration."""
    wanted["prune"] |= {"method": "magnitude", "nsamples": 2}
    return wanted | {"lines": {}, "vary": {"pattern": ["2:4", "4:8", "unstructured:0.5"]}}


def command(wanted: dict[str, Any]) -> int:
    """`prox24 sweep` with the YAML file beside the sweep's folder."""
    file = Path(wanted["folder"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(wanted, sort_keys=False))
    return run(["sweep", "--config", str(file)])


def rows(wanted: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The table's rows by name, without what differs from one run of a job to another."""
    with (Path(wanted["folder"]) / "sweep.csv").open(newline="") as file:
        found = {row["run"]: row for row in csv.DictReader(file)}
    measured = ("seconds", "driver_rss", "worker_rss")
    return {
        name: {key: value for key, value in row.items() if not key.startswith(measured)}
        for name, row in found.items()
    }


# -- the plan ------------------------------------------------------------------------------------


def plan(**changes: Any) -> Any:
    options = {"model": "m", "folder": "f", "vary": {"nsamples": ["1", "2"]}}
    return read_plan(options | changes, "sweep.yaml")


def test_points_are_the_product_line_by_line() -> None:
    made = plan(
        prune={"seqlen": "64"},
        lines={"a": {"method": "wanda"}, "b": {"method": "sparsegpt", "blocksize": "32"}},
        vary={"nsamples": ["1", "8"], "damping": ["0.01", "0.1"]},
    )
    assert made.axis == "nsamples"
    assert [point.name for point in made.points][:3] == [
        "a damping=0.01 nsamples=1",
        "a damping=0.01 nsamples=8",
        "a damping=0.1 nsamples=1",
    ]
    assert len({point.folder for point in made.points}) == 8
    assert made.points[5].line == "b damping=0.01"
    assert made.points[5].x == "8"
    assert made.points[5].options == {
        "seqlen": "64", "method": "sparsegpt", "blocksize": "32", "damping": "0.01", "nsamples": "8"
    }  # fmt: skip


def test_no_steps_are_no_refinement() -> None:
    made = plan(prune={"refine": "gradient"}, vary={"refine_steps": ["0", "50"]})
    assert made.points[0].options == {"refine": "none"}
    assert made.points[0].x == "0"
    assert made.points[1].options == {"refine": "gradient", "refine-steps": "50"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vary": {}}, "`vary` is missing"),
        ({"vary": {"nsamples": "3"}}, "must be a list"),
        ({"vary": {"nsamples": [["3"]]}}, "must be one value"),
        ({"vary": {"nsamples": ["3", "3"]}}, "two runs are called"),
        ({"vary": {"run-dir": ["x"]}}, "set by the sweep"),
        ({"prune": {"nsamples": "3"}}, "in `vary` and in prune"),
        ({"prune": ["a"]}, "must be a mapping"),
        ({"prune": {"eval_dataset": "x"}}, "set by the sweep"),
        ({"lines": {"a": {"overwrite": True}}}, "set by the sweep"),
        ({"eval": {"json": True}}, "set by the sweep"),
        ({"lines": {"a b": {}, "a/b": {}}}, "two runs are called"),
        ({"model": ""}, "`model` is missing"),
        ({"folder": ["x"]}, "folder must be one path"),
        ({"keep_models": "often"}, "true or false"),
        ({"varies": {}}, "varies is not one of"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match="sweep.yaml") as raised:
        plan(**changes)
    assert told in str(raised.value)


@pytest.mark.parametrize("label", ["../../x", ".", "a/b", "a b", "ü$(rm)", "", "x" * 300])
def test_names_of_folders_lead_nowhere_else(label: str) -> None:
    name = folder_name(label)
    assert Path(name).name == name
    assert 0 < len(name) <= 100
    assert not name.startswith((".", "-"))


# -- whole sweeps --------------------------------------------------------------------------------


def test_a_sweep_shares_what_is_shared_and_agrees_with_single_commands(
    wanted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cuts: list[int] = []
    passes: list[str] = []
    count(monkeypatch, "cut_tokens", lambda skeleton, config: cuts.append(config.nsamples))
    count(
        monkeypatch,
        "evaluated",
        lambda prepared, *_: passes.append(prepared.skeleton.files.place.name),
    )
    wanted["keep_models"] = True
    assert command(wanted) == 0
    assert sorted(cuts) == [3, 6]  # for two lines each
    assert passes.count("model") == 1
    assert len(passes) == 5
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    folder = Path(wanted["folder"])
    assert {path.name for path in folder.iterdir()} == {
        "sweep.json", "dense.json", "runs", "models",
        *(f"sweep.{kind}" for kind in ("md", "csv", "parquet", "png", "svg")),
    }  # fmt: skip
    table = rows(wanted)
    assert list(table) == [
        "dense", "wanda nsamples=3", "wanda nsamples=6",
        "sparsegpt+gd nsamples=3", "sparsegpt+gd nsamples=6",
    ]  # fmt: skip
    text = wanted["prune"]["dataset"]
    options = ["--executor", "local", "--threads", "1", "--batch-size", "2", "--dataset", text]
    alone = tmp_path / "alone"
    chosen = ["--method", "sparsegpt", "--nsamples", "6", "--seqlen", "24"]
    chosen += ["--refine", "gradient", "--refine-steps", "20"]
    assert run(["prune", wanted["model"], str(alone), *options, *chosen]) == 0
    same, own = contents(folder / "models" / "sparsegpt+gd_nsamples=6"), contents(alone)
    assert same["model.safetensors"] == own["model.safetensors"]
    judged = ["eval", wanted["model"], str(alone), *options, "--seqlen", "16", "--nsamples", "5"]
    capsys.readouterr()
    assert run([*judged, "--json"]) == 0
    dense, pruned = json.loads(capsys.readouterr().out)["models"]
    row = table["sparsegpt+gd nsamples=6"]
    assert float(row["perplexity"]) == pruned["perplexity"]
    assert float(table["dense"]["perplexity"]) == dense["perplexity"]
    for key, value in pruned["against_first"].items():
        assert float(row[key]) == value


def count(monkeypatch: pytest.MonkeyPatch, name: str, told: Callable[..., None]) -> None:
    """Has `told` called with the arguments of each call of a function that the sweep uses."""
    original = getattr(pipeline.sweep.run, name)

    def counted(*arguments: Any) -> Any:
        told(*arguments)
        return original(*arguments)

    monkeypatch.setattr(pipeline.sweep.run, name, counted)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("in a job", marks=pytest.mark.slow),
        "before the evaluation's commit",
        pytest.param("after it", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_sweep_goes_on_with_what_is_missing(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder = Path(quick["folder"])
    with monkeypatch.context() as patched:
        stop_in_the_last_run(patched, moment)
        assert command(quick) == 130
    done = [read_evaluation(RunDirectory(path)) for path in (folder / "runs").iterdir()]
    assert sum(figures is not None for figures in done) == (3 if moment == "after it" else 2)
    before = contents(folder)
    leftover = folder / "prox24-scratch-of-a-kill"
    leftover.mkdir()
    pruned: list[str] = []
    count_prunes(monkeypatch, pruned)
    assert command(quick) == 0
    assert pruned == ([] if moment == "after it" else ["pattern=unstructured_0.5"])
    assert not leftover.exists()
    assert list((folder / "models").iterdir()) == []
    after = contents(folder)
    kept = {name: raw for name, raw in before.items() if name.endswith("evaluation.json")}
    assert kept.items() <= after.items()
    # What was broken off is what it would have been.
    last = after["runs/pattern=unstructured_0.5/report/evaluation.json"]
    shutil.rmtree(folder)
    assert command(quick) == 0
    assert contents(folder)["runs/pattern=unstructured_0.5/report/evaluation.json"] == last


def stop_in_the_last_run(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """The last of three runs, or what follows it, is broken off as by Ctrl-C."""
    name = {"in a job": "prune", "after it": "_discard"}.get(moment, "write_evaluation")
    original = getattr(pipeline.sweep.run, name)
    calls = 0

    def stopping(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        # The table is written after each run, and asks each time to discard what was evaluated.
        if calls < (4 if name == "_discard" else 3):
            return original(*arguments, **options)
        if name == "prune":
            stop_after_a_block(monkeypatch)
            return original(*arguments, **options)
        raise KeyboardInterrupt("SIGINT")

    monkeypatch.setattr(pipeline.sweep.run, name, stopping)


def stop_after_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.records.live_status import RecordedProgress

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt("SIGINT")

    monkeypatch.setattr(RecordedProgress, "block_done", stop)


def count_prunes(monkeypatch: pytest.MonkeyPatch, pruned: list[str]) -> None:
    original = pipeline.sweep.run.prune

    def counted(source: Any, output: Any, *arguments: Any, **options: Any) -> Any:
        pruned.append(output.name)
        return original(source, output, *arguments, **options)

    monkeypatch.setattr(pipeline.sweep.run, "prune", counted)


def test_another_sweep_in_the_folder_is_refused(
    quick: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    quick["vary"] = {"pattern": ["2:4"]}
    assert command(quick) == 0
    before = contents(Path(quick["folder"]))
    for changed in (
        {"vary": {"pattern": ["2:4", "4:8"]}},
        {"prune": quick["prune"] | {"seed": 7}},
        {"eval": quick["eval"] | {"nsamples": 4}},
    ):
        capsys.readouterr()
        assert command(quick | changed) == 2
        message = capsys.readouterr().err
        assert "another sweep" in message
        assert len(message.splitlines()) == 1
    assert contents(Path(quick["folder"])) == before
    assert command(quick | {"prune": quick["prune"] | {"threads": 2}}) == 0  # where, not what


@pytest.mark.slow
def test_changed_weights_are_not_mixed_with_those_of_before(
    quick: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    quick["vary"] = {"pattern": ["2:4", "4:8"]}
    assert command(quick) == 0
    shutil.rmtree(Path(quick["folder"]) / "runs" / "pattern=4_8")
    shutil.rmtree(quick["model"])
    save_tiny_model(Path(quick["model"]), seed=1)
    assert command(quick) == 2
    assert "weights changed" in capsys.readouterr().err


def test_a_run_that_leaves_the_numbers_is_named_and_the_others_are_done(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = pipeline.sweep.run.prune

    def failing(source: Any, output: Any, *arguments: Any, **options: Any) -> Any:
        if output.name == "pattern=4_8":
            raise NumericalError("block 1: not finite")
        return original(source, output, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline.sweep.run, "prune", failing)
        assert command(quick) == 1
    assert "pattern=4:8 failed: block 1: not finite" in capsys.readouterr().err
    assert list(rows(quick)) == ["dense", "pattern=2:4", "pattern=unstructured:0.5"]
    assert command(quick) == 0
    assert len(rows(quick)) == 4


@pytest.mark.parametrize(
    "what", ["folder", "same", "option", "value", "text", "responses", "twice", "method"]
)
def test_bad_input_is_refused_before_any_run(
    wanted: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    told = {
        "folder": "not the folder of a sweep",
        "same": "are the same job",
        "option": "--nsample",
        "value": "--nsamples",
        "text": "fewer than",
        "responses": "--calibrate-on responses needs chat data",
        "twice": "stands twice",
        "method": "wander",
    }[what]
    folder = Path(wanted["folder"])
    if what == "folder":
        folder.mkdir()
        (folder / "thesis.tex").write_text("mine")
    elif what == "same":
        wanted |= {"lines": {"wanda": LINES["wanda"]}, "vary": {"refine_steps": [5, 10]}}
    elif what == "option":
        wanted["prune"]["nsample"] = 3
    elif what == "value":
        wanted["vary"] = {"nsamples": [3, "many"]}
    elif what == "text":
        wanted["vary"] = {"nsamples": [3, 1000]}
    elif what == "responses":
        wanted["vary"] = {"calibrate_on": ["all", "responses"]}
    elif what == "method":
        wanted["lines"]["wanda"]["method"] = "wander"
    file = tmp_path / "sweep.yaml"
    text = yaml.safe_dump(wanted, sort_keys=False)
    file.write_text(text + "model: again\n" if what == "twice" else text)
    assert run(["sweep", "--config", str(file)]) == 2
    message = capsys.readouterr().err
    assert told in message
    assert len(message.splitlines()) == 1
    assert not (folder / "runs").exists()


# -- plots ---------------------------------------------------------------------------------------


def test_values_lie_on_the_axis_by_what_they_are() -> None:
    assert positions(["1", "2", "4", "32"]) == {"1": 0, "2": 1, "4": 2, "32": 5}
    assert positions(["0", "50", "100", "400"])["0"] == positions(["25", "100"])["25"]
    assert positions(["0", "1", "2"]) == {"0": 0, "1": 1, "2": 2}
    assert positions(["cg", "none"]) == {"cg": 0, "none": 1}
    assert positions(["-1", "8"]) == {"-1": -1, "8": 8}


def test_plots_depend_on_their_figures_alone(tmp_path: Path) -> None:
    lines = (Line("wanda", ("1", "8"), (90.0, 30.5)), Line("prox", ("1", "8"), (None, 20.0)))
    panels = [Panel("perplexity", lines, 12.5), Panel("error", lines)]
    first = [path.read_bytes() for path in draw(tmp_path, "a", "nsamples", panels)]
    again = [path.read_bytes() for path in draw(tmp_path, "a", "nsamples", panels)]
    assert first == again
    assert first[0].startswith(b"\x89PNG")
    drawn = first[1].decode("utf-8")
    for word in ("wanda", "prox", "dense", "nsamples", "perplexity"):
        assert f"<!-- {word} -->" in drawn
