"""`prox24 compare`: finished jobs side by side, from their run directories alone."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from cluster.command_line import run
from pipeline.records.evaluation import read_evaluation, write_evaluation
from pipeline.reporting.compare_runs import ERRORS, OBJECTIVES, comparison, read_runs
from pipeline.reporting.run_summary import kind_of
from pipeline.reporting.tables import Column, Table, arrow, markdown
from storage.run.directory import RunDirectory
from tests.support.jobs import prune_here, write_text
from tests.support.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two finished jobs whose models are gone: one evaluated, one not."""
    folder = tmp_path_factory.mktemp("compare")
    model = save_tiny_model(folder / "dense")
    text = str(write_text(folder / "text.txt"))
    found = {}
    for name, options in {
        "sparse": {"method": "sparsegpt", "damping": 0.1, "eval_dataset": text, "eval_nsamples": 4},
        "wanda": {"method": "wanda", "nsamples": 6},
    }.items():
        prune_here(model, folder / name, dataset=text, **options)
        found[name] = folder / f"{name}.run"
    shutil.rmtree(folder / "sparse")
    return found


def test_what_differs_and_what_came_of_it(runs: dict[str, Path], tmp_path: Path) -> None:
    table = comparison(read_runs(list(runs.values())))
    columns = {column.name: column.values for column in table.columns}
    assert table.rows == ("sparse", "wanda")
    assert columns["method"] == ("sparsegpt", "wanda")
    assert columns["nsamples"] == (8, 6)
    assert columns["damping"] == (0.1, 0.001)  # the default of wanda, filled in
    assert "seqlen" not in columns
    assert "pattern" not in columns
    summary = json.loads((runs["sparse"] / "report" / "summary.json").read_text())
    solves = [layer for block in summary["blocks"] for layer in block["layers"].items()]
    for kind in ("self_attn.q_proj", "mlp.down_proj"):
        own = [report for name, report in solves if name == kind]
        assert len(own) == 2
        objective, zero = (sum(r[key] for r in own) for key in ("objective", "objective_zero"))
        assert columns[f"objective {kind}"][0] == pytest.approx(objective)
        assert columns[f"relative_error {kind}"][0] == pytest.approx(100 * objective / zero)
    assert columns["objective"][0] == pytest.approx(sum(r["objective"] for _, r in solves))
    assert columns["seconds"][0] == pytest.approx(summary["wall"])
    evaluated = read_evaluation(RunDirectory(runs["sparse"]))
    assert evaluated is not None
    assert columns["perplexity"] == (evaluated["perplexity"], None)
    assert columns["relative_error statistic"] == ("full", "diagonal")
    assert any("are not comparable" in note for note in table.notes)


def test_the_perplexity_is_that_of_the_output(runs: dict[str, Path], tmp_path: Path) -> None:
    text = runs["wanda"].parent / "text.txt"
    result = prune_here(
        runs["wanda"].parent / "dense",
        tmp_path / "pruned",
        method="magnitude",
        dataset=str(text),
        eval_dataset=str(text),
        eval_nsamples=3,
    )
    stated = json.loads((tmp_path / "pruned" / "prox24.json").read_text())["perplexity"]
    assert read_evaluation(RunDirectory(result.run_directory)) == stated


def test_the_command_writes_three_files_that_say_the_same(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", *map(str, runs.values()), "--output", str(tmp_path / "out")]
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for word in ("sparsegpt", "perplexity", "down_proj", "are not comparable"):
        assert word in printed
    stored = pyarrow.parquet.read_table(tmp_path / "out" / "compare.parquet").to_pylist()
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == stored
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["sparse", "wanda"]
    assert float(rows[0]["objective"]) == pytest.approx(stored[0]["objective"])
    assert rows[1]["perplexity"] == ""
    text = (tmp_path / "out" / "compare.md").read_text()
    assert f"## {ERRORS}" in text
    assert f"| sparse | {stored[0]['objective']:.4g} |" in text.partition(OBJECTIVES)[2]


@pytest.mark.parametrize("what", ["nowhere", "unfinished", "twice", "damaged", "foreign"])
def test_what_cannot_be_compared_is_refused(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    own = tmp_path / "own.run"
    shutil.copytree(runs["wanda"], own)
    arguments, told = (
        [str(runs["sparse"]), str(own)],
        {
            "nowhere": "is the run directory of a job",
            "unfinished": "has not finished",
            "twice": "given twice",
            "damaged": "summary.json",
            "foreign": "written by another version",
        }[what],
    )
    summary = own / "report" / "summary.json"
    if what == "nowhere":
        arguments[1] = str(tmp_path / "nothing")
    elif what == "unfinished":
        summary.unlink()
    elif what == "twice":
        arguments = [str(own), str(own)]
    elif what == "damaged":
        (own / "report" / "evaluation.json").write_text("{}")
        told = "evaluation.json"
    elif what == "foreign":
        from storage.files.commit import read_json, replace_json

        payload = read_json(summary, 1)
        del payload["wall"]
        replace_json(summary, payload)
    assert run(["compare", *arguments]) == 2
    message = capsys.readouterr().err
    assert told in message
    assert len(message.splitlines()) == 1


def test_runs_of_one_name_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "wanda.run"
    shutil.copytree(runs["wanda"], other)
    table = comparison(read_runs([runs["wanda"], other]))
    assert table.rows == (str(runs["wanda"]), str(other))


def test_infinite_figures_are_kept_as_unknown(tmp_path: Path) -> None:
    run_directory = RunDirectory(tmp_path / "run")
    figures = {"perplexity": 3.5, "against_dense": {"kullback_leibler": float("inf"), "same": 1}}
    write_evaluation(run_directory, figures)
    assert read_evaluation(run_directory) == {
        "perplexity": 3.5,
        "against_dense": {"kullback_leibler": None, "same": 1},
    }


def test_kinds_of_layers_do_not_count_experts() -> None:
    assert kind_of("mlp.experts.17.w1") == kind_of("mlp.experts.3.w1") == "mlp.experts.*.w1"
    assert kind_of("fc1") == "fc1"


def test_columns_of_several_types_become_text_or_floats() -> None:
    columns = (
        Column("a", "a", "x", (1, 0.5, None), "g"),
        Column("b", "b", "x", ("estimate", 0.25, None), "g"),
        Column("c", "c", "x", (None, None, None)),
    )
    table = Table(("one", "two | 2", "three"), columns)
    assert arrow(table).to_pylist()[:2] == [
        {"run": "one", "a": 1.0, "b": "estimate", "c": None},
        {"run": "two | 2", "a": 0.5, "b": "0.25", "c": None},
    ]
    assert "| two \\| 2 | 0.5 | 0.25 |" in markdown(table)


def test_hashes_are_cut_for_people_only() -> None:
    table = Table(("one",), (Column("sha256", "sha256", "x", ("0123456789abcdef" * 4,)),))
    assert "| 0123456789ab |" in markdown(table)
    assert arrow(table).to_pylist()[0]["sha256"] == "0123456789abcdef" * 4
