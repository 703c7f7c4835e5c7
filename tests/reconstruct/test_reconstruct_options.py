"""The options of the reconstruction with others: what is refused, said, and computed."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.command_line import run
from pipeline import prune as job_of
from pipeline.config.effect import unused_options
from pipeline.config.prune import PruneConfig
from pipeline.preflight import disk
from pipeline.records.summary import read_summary
from storage.errors import ConfigError
from storage.run.directory import RunDirectory
from storage.run.layer_files import read_layer_file
from tests.reconstruct.test_reconstruct_kills import kill_in_step
from tests.support.damage import Notes
from tests.support.jobs import SMALL, contents, fits, prune_here, tensors, write_text
from tests.support.processes import Driver, until
from tests.support.tiny_models import save_tiny_model

OPTIONS: dict[str, Any] = {"reconstruct": "block", "reconstruct_epochs": 2}
GIVEN = {
    "epochs": "3",
    "batch": "2",
    "lr": "0.001",
    "target": "dense-block",
    "mask": "exchange",
    "norms": None,  # a flag
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "llama", blocks=2)


@pytest.mark.parametrize("name", GIVEN)
def test_an_option_without_effect_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text = str(write_text(tmp_path / "text.txt"))
    command = ["prune", str(model), str(tmp_path / "out"), "--dataset", text, "--executor=local"]
    option = f"--reconstruct-{name}"
    given = [option] if GIVEN[name] is None else [option, GIVEN[name]]
    assert run([*command, "--reconstruct=none", *given]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "prox24: " in line]
    assert f"{option} has no effect: with --reconstruct none" in line
    assert not (tmp_path / "out.run").exists()


def test_with_defaults_what_was_chosen_is_said_and_recorded(model: Path, tmp_path: Path) -> None:
    """No option of the reconstruction is given; 33 sequences make a step of two."""
    output = tmp_path / "out"
    arguments = ["prune", model, output, "--dataset", write_text(tmp_path / "text.txt")]
    arguments += ["--executor=local", "--threads=1", "--nsamples=33", "--seqlen=16"]
    driver = Driver(arguments, tmp_path / "log")
    assert driver.wait() == 0, driver.errors()
    said = " ".join((driver.output() + driver.errors()).split())
    assert "up to 15 epochs in steps of 2 sequences, learning rate 0.016" in said
    assert "None" not in said
    settings = json.loads((output / "prox24.json").read_text())["job"]["settings"]
    assert (settings["reconstruct"], settings["reconstruct_batch"]) == ("auto", 2)
    assert settings["reconstruct_epochs"] == 15
    card = (output / "README.md").read_text()
    assert "| sequences a step | `2` |" in card
    assert "| reconstruction epochs, at most | `15` |" in card


def test_why_auto_leaves_blocks_as_they_are() -> None:
    given = ["reconstruct_epochs"]
    assert not unused_options(PruneConfig(reconstruct="auto"), given)
    wanda = unused_options(PruneConfig(reconstruct="auto", method="wanda"), given)
    assert "leaves this method's blocks" in wanda["reconstruct_epochs"]
    one = unused_options(PruneConfig(reconstruct="auto", nsamples=1), given)
    assert "--nsamples must be at least 2, not 1" in one["reconstruct_epochs"]


def test_one_sequence_cannot_be_divided(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--reconstruct block: .*--nsamples must be at least 2"):
        PruneConfig(reconstruct="block", nsamples=1)
    text = str(write_text(tmp_path / "text.txt"))
    for name, options in (("none", {}), ("auto", {"reconstruct": "auto"})):
        notes = Notes()
        folder = tmp_path / name
        prune_here(model, folder, dataset=text, nsamples=1, progress=notes, **options)
        said = [note for note in notes.notes if "--reconstruct auto leaves blocks as they" in note]
        assert len(said) == (name == "auto")
    made = [sorted(tensors(tmp_path / name)) for name in ("none", "auto")]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*made, strict=True))
    # Of two, one is learned from, and the other one judges.
    prune_here(model, tmp_path / "two", dataset=text, nsamples=2, **OPTIONS)
    blocks = read_summary(RunDirectory(tmp_path / "two.run"))["blocks"]
    assert all(block["reconstruct"]["epochs"] > 0 for block in blocks)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "unstructured:0.5"])
def test_weights_change_places_with_every_pattern(
    model: Path, tmp_path: Path, pattern: str
) -> None:
    text = str(write_text(tmp_path / "text.txt"))
    shared: dict[str, Any] = {"pattern": pattern, "dataset": text, "nsamples": 16}
    prune_here(model, tmp_path / "solved", **shared)
    exchange = {"reconstruct_mask": "exchange", "reconstruct_lr": 0.003, "reconstruct_epochs": 4}
    prune_here(model, tmp_path / "out", **shared, **(OPTIONS | exchange))
    solved, moved = dict(tensors(tmp_path / "solved")), 0
    for name, tensor in tensors(tmp_path / "out"):
        if ".layers." not in name or "proj" not in name:
            continue
        moved += int(((tensor != 0) != (solved[name] != 0)).sum())
        if ":" in pattern and not pattern.startswith("u"):
            assert fits(tensor, *map(int, pattern.split(":"))), name
        else:
            assert int((tensor != 0).sum()) <= int((solved[name] != 0).sum()), name
    assert moved > 0


def test_saved_layers_are_those_of_the_solve(model: Path, tmp_path: Path) -> None:
    text = str(write_text(tmp_path / "text.txt"))
    saved = []
    for name, options in (("plain", {}), ("trained", OPTIONS)):
        prune_here(model, tmp_path / name, dataset=text, save_layers="*.0.*q_proj", **options)
        (path,) = (tmp_path / f"{name}.run" / "layers").glob("*.safetensors")
        saved.append(read_layer_file(path))
    assert torch.equal(saved[0].weight, saved[1].weight)
    assert contents(tmp_path / "plain.run/layers") == contents(tmp_path / "trained.run/layers")


def test_overrides(model: Path, tmp_path: Path) -> None:
    """Dense layers stay, another method and pattern are kept, and the others are trained."""
    override = "*.down_proj=dense;*.o_proj=wanda,4:8;*.q_proj=magnitude"
    prune_here(model, tmp_path / "solved", override=override)
    prune_here(model, tmp_path / "out", override=override, **OPTIONS)
    source, solved = dict(tensors(model)), dict(tensors(tmp_path / "solved"))
    for name, tensor in tensors(tmp_path / "out"):
        if "down_proj" in name:
            assert torch.equal(tensor, source[name])
        elif ".layers.0." in name and "_proj" in name:
            assert not torch.equal(tensor, solved[name]), name
            assert fits(tensor, *((4, 8) if "o_proj" in name else (2, 4))), name


def test_the_disk_is_checked_for_a_third_store(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs: list[int] = []
    monkeypatch.setattr(disk, "_require", lambda uses: needs.append(uses[0][1]))
    stores: list[int] = []
    monkeypatch.setattr(
        job_of, "check_scratch_space", lambda _, __, **named: stores.append(named["stores"])
    )
    text = str(write_text(tmp_path / "text.txt"))
    for name, options in (("plain", {}), ("trained", OPTIONS)):
        prune_here(model, tmp_path / name, dataset=text, **options)
        scratch = {"scratch_dir": str(tmp_path / "scratch")}
        prune_here(model, tmp_path / f"{name}-scratch", dataset=text, **options, **scratch)
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    store = SMALL["nsamples"] * SMALL["seqlen"] * width * 4
    plain, plain_scratch, trained, trained_scratch = needs
    assert trained - plain == store
    assert trained_scratch == plain_scratch == plain - 2 * store
    assert stores == [2, 3]


def test_status_names_the_phase(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a driver that stands still in the second epoch of the first block."""
    output = tmp_path / "out"
    arguments = ["prune", model, output, "--dataset", write_text(tmp_path / "text.txt")]
    arguments += ["--executor=local", "--threads=1", "--nsamples=4", "--seqlen=32"]
    arguments += ["--reconstruct=block", "--reconstruct-epochs=3"]
    driver = Driver(arguments, tmp_path / "log", first=partial(kill_in_step, 5, signal.SIGSTOP))
    try:
        until(lambda: any(p.status() == "stopped" for p in driver.session()), "its stop")
        assert run(["status", str(output), "--json"]) == 0
        status = json.loads(capsys.readouterr().out)
        assert status["state"] == "running"
        assert status["phase"]["name"] == "reconstruct 2/3"
        assert status["phase"]["block"] == 0
        assert status["blocks"]["done"] == 0
        assert run(["status", str(output)]) == 0
        assert "reconstruct 2/3" in capsys.readouterr().out
    finally:
        driver.send(signal.SIGKILL)
        driver.wait()
    assert run(["status", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "dead"
