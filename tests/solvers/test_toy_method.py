"""A method is one file and one line: a new one goes through every command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cluster.command_line import run
from pipeline.config.methods import METHODS
from storage.errors import ConfigError
from tests.support.jobs import check_output, write_text
from tests.support.tiny_models import save_tiny_model

LOCAL = ["--executor", "local", "--threads", "1", "--nsamples", "8", "--seqlen", "32"]


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line."""
    monkeypatch.setitem(METHODS, "rightmost", "tests.support.toy_method.RightmostSolver")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def test_help_names_it_with_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prune", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "rightmost (keeps what lies furthest to the right)" in text
    assert "rightmost 0.25" in text  # its damping
    assert "rightmost's cg 3" in text


def test_prune(model: Path, tmp_path: Path) -> None:
    text = str(write_text(tmp_path / "text.txt"))
    output = tmp_path / "output"
    arguments = [*LOCAL, "--dataset", text, "--method", "rightmost", "--refine", "none"]
    assert run(["prune", str(model), str(output), *arguments]) == 0
    check_output(model, output)
    name = "model.layers.1.mlp.down_proj.weight"
    dense, pruned = (load_file(folder / "model.safetensors")[name] for folder in (model, output))
    kept = torch.tensor([False, False, True, True]).repeat(dense.shape[1] // 4)
    assert torch.equal(pruned, dense * kept)
    assert run(["verify", str(output), "--source", str(model)]) == 0


def test_as_an_override_with_its_own_refinement(model: Path, tmp_path: Path) -> None:
    text = str(write_text(tmp_path / "text.txt"))
    output = tmp_path / "output"
    arguments = [*LOCAL, "--dataset", text, "--method", "wanda"]
    arguments += ["--override", "*.down_proj=rightmost"]
    assert run(["prune", str(model), str(output), *arguments]) == 0
    layers = json.loads((output / "prox24.json").read_text())["layers"]
    found = {layer["method"]: (layer["refine"], layer["refine_steps"]) for layer in layers}
    assert found == {"wanda": ("none", 0), "rightmost": ("cg", 3)}


def test_solve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight, inputs = torch.randn(8, 16), torch.randn(2, 32, 16)
    save_file({"weight": weight, "inputs": inputs}, tmp_path / "layer.safetensors")
    assert run(["solve", str(tmp_path / "layer.safetensors"), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results) == list(METHODS)
    report = results["rightmost"]["report"]
    assert report["refine_steps"] == 3
    assert report["damping"] == 0.25
    # Refined by conjugate gradients: less than what the bare mask loses.
    assert report["objective"] < report["objective_before"]


def test_plan(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(model), "--method", "rightmost", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["seconds"] > 0


def test_sweep(model: Path, tmp_path: Path) -> None:
    text = str(write_text(tmp_path / "text.txt"))
    wanted = {
        "model": str(model),
        "folder": str(tmp_path / "sweep"),
        "prune": {"executor": "local", "threads": 1, "dataset": text, "nsamples": 4, "seqlen": 24,
                  "no_report": True},
        "eval": {"dataset": text, "seqlen": 16, "nsamples": 4},
        "vary": {"method": ["rightmost", "magnitude"]},
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(wanted))
    assert run(["sweep", "--config", str(tmp_path / "sweep.yaml")]) == 0
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert any("rightmost" in name for name in rows)


def test_a_method_whose_facts_are_no_literals_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "computed_method.py").write_text('HELP = "a" + "b".upper()\nDEFAULTS = {}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(METHODS, "computed", "computed_method.Solver")
    from pipeline.config.methods import method_facts

    with pytest.raises(ConfigError, match="HELP in .* must be a literal"):
        method_facts("computed")
    with pytest.raises(ConfigError, match="unknown method 'nothing': choose one of magnitude"):
        method_facts("nothing")
