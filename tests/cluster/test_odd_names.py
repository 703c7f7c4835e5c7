"""Any name of a file works anywhere: in paths, messages, records, pages and on Ray; `~` is home."""

from __future__ import annotations

import html
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.csv
import pytest
import yaml

from actors.metrics import run_label
from cluster.command_line import run
from cluster.options import read_yaml
from storage.files.names import printable, shell_line
from tests.support.jobs import check_output, write_text
from tests.support.refusals import LOCAL, refuse

TinyModel = Callable[..., Path]
QUICK = ("--nsamples", "4", "--seqlen", "32", "--method", "wanda")
BYTES = os.fsdecode(b"n\xff\xe9")
NAMES = {
    "other alphabets": "é 中 ❤",
    "shells": "a'b\"c $HOME `id`;*?&|",
    "markup": "[bold]x[] #y%20z {0} <b>&amp;|",
    "lines": "-x\ny\tz\x1b[31m",
    "bytes": BYTES,
}


def line(name: str) -> str:
    return printable(name)


@pytest.mark.parametrize("kind", NAMES)
def test_a_job_whose_every_path_has_an_odd_name(
    tiny_model: TinyModel, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    name = NAMES[kind]
    (folder := tmp_path / name).mkdir()
    model, output, state = folder / name, folder / f"{name}-out", folder / f"{name}-run"
    shutil.copytree(tiny_model(), model)
    text = write_text(folder / f"{name}.txt")
    data = ["--dataset", str(text)]
    own = ["--run-dir", str(state), "--scratch-dir", str(folder / f"{name}-s")]
    own += ["--trace", str(folder / f"{name}-t"), "--eval-dataset", str(text)]
    options = [*QUICK, "--executor", "local", "--threads", "1", *data, *own]
    if "$" in name:  # a variable, which each node expands
        del options[options.index("--scratch-dir") : options.index("--scratch-dir") + 2]
    capfd.readouterr()  # what making the model has printed
    assert run(["prune", str(model), str(output), *options]) == 0
    shown = capfd.readouterr().err
    assert f"wrote {line(str(output))}\n" in shown
    assert f"report: {line(str(state))}/report/report.html\n" in shown
    assert not {c for c in shown if not c.isprintable()} - {"\n"}
    for path in (model, output):  # safetensors itself opens no path that is not UTF-8
        shutil.copytree(path, tmp_path / f"{path == model}")
    check_output(tmp_path / "True", tmp_path / "False")
    assert json.loads((folder / f"{name}-t").read_text())
    for path in (state, output):
        assert run(["status", str(path)]) == (0 if path == state else 2)
    assert "finished" in capfd.readouterr().out
    assert run(["status", str(state), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["run_directory"] == str(state)
    assert run(["report", str(state)]) == 0
    assert capfd.readouterr().out.rstrip("\n").endswith("report.html")
    page = (state / "report" / "report.html").read_text(encoding="utf-8")
    assert line(name) in html.unescape(page)
    assert run(["compare", str(state), "--output", str(folder / f"{name}-c")]) == 0
    table = (folder / f"{name}-c" / "compare.csv").read_bytes()
    (row,) = pyarrow.csv.read_csv(io.BytesIO(table)).to_pylist()
    assert row["run"] == line(f"{name}-run")
    assert run(["verify", str(output), "--source", str(model)]) == 0
    assert run(["eval", str(output), *LOCAL, *data, "--nsamples", "4"]) == 0
    card = (output / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["tags"]
    assert card.split("---", 2)[2].lstrip().startswith("# ")
    assert len([row for row in card.splitlines() if ", pruned to 2:4" in row]) == 2
    assert run(["plan", str(model), "--seqlen", "32"]) == 0
    assert run(["prune", str(model), str(output), *options]) == 0  # finished: nothing is left to do


@pytest.mark.slow
def test_on_ray(tiny_model: TinyModel, tmp_path: Path, repository: Path) -> None:
    """The default executor, as a process: nothing of Ray is in the way of a name."""
    name = f"é 中'\n#%{BYTES}"
    (folder := tmp_path / name).mkdir()
    shutil.copytree(tiny_model(), folder / name)
    text = write_text(folder / f"{name}.txt")
    arguments = ["prune", name, f"out{name}", *QUICK, "--dataset", text.name, "--workers", "1"]
    arguments += ["--run-dir", f"run{name}", "--scratch-dir", str(folder / "scratch")]
    done = subprocess.run(
        [sys.executable, "-m", "cluster", *map(os.fsencode, arguments)],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"Traceback" not in done.stderr
    assert f"wrote {line(str(folder / f'out{name}'))}".encode() in done.stderr
    for path in (name, f"out{name}"):
        shutil.copytree(folder / path, tmp_path / f"{path == name}")
    check_output(tmp_path / "True", tmp_path / "False")


def test_labels_of_metrics_are_ascii_and_differ() -> None:
    names = [*NAMES.values(), "plain.run", "é", "e", "%C3%A9", "\udcc3\udca9", 'a"', "a\\", "a b"]
    labels = [run_label(name) for name in names]
    for label in labels:
        assert label.isascii()
        assert label.isprintable()
        assert not set('"\\') & set(label)
    # "é" in UTF-8 is what the two bytes spell: the same name.
    assert len(set(labels)) == len(set(map(os.fsencode, names)))
    assert run_label("Llama-3.1-8B_2:4 (x).run") == "Llama-3.1-8B_2:4 (x).run"


@pytest.mark.parametrize("shell", ["bash", "zsh", "ksh"])
def test_the_command_that_is_printed_is_taken_apart_as_it_was(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    arguments = [*NAMES.values(), "", "~", "a\\n", "'\n'", "\u200b'x", "--x=y z", "!a"]
    printed = shell_line(arguments)
    assert printed.isprintable()
    script = tmp_path / "script"
    script.write_text(f"printf '%s\\0' {printed}\n", encoding="utf-8")
    done = subprocess.run([shell, str(script)], capture_output=True, check=True)
    assert done.stdout == b"".join(os.fsencode(argument) + b"\0" for argument in arguments)


def test_a_terminal_that_cannot_show_a_name(
    tiny_model: TinyModel, tmp_path: Path, repository: Path
) -> None:
    """Its encoding lacks it: an escape is shown, on standard output too."""
    (folder := tmp_path / "é中").mkdir()
    text = write_text(folder / "text.txt")
    arguments = ["eval", str(tiny_model()), *LOCAL, "--dataset", str(text), "--nsamples", "2"]
    shutil.move(text, folder / "té中.txt")
    arguments[arguments.index(str(text))] = str(folder / "té中.txt")
    done = subprocess.run(
        [sys.executable, "-m", "cluster", *arguments],
        cwd=repository, env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"on t\xe9\\u4e2d.txt (2 x 32 tokens" in done.stdout


# -- home -----------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel) -> Path:
    """A home with a model and a text, and another current folder."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    shutil.copytree(tiny_model(), home / "model")
    write_text(home / "text.txt")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return home


def test_home_in_every_path(home: Path) -> None:
    options = [*QUICK, "--executor", "local", "--threads", "1", "--no-report"]
    options += ["--dataset", "~/text.txt", "--run-dir", "~/run", "--trace=~/trace"]
    options += ["--eval-dataset", "~/text.txt", "--scratch-dir", "~/scratch"]
    assert run(["prune", "~/model", "~/out", *options]) == 0
    check_output(home / "model", home / "out")
    assert {"run", "out", "trace", "scratch"} <= {path.name for path in home.iterdir()}
    assert run(["status", "~/run"]) == 0
    assert run(["verify", "~/out", "--source", "~/model"]) == 0
    assert run(["compare", "~/run", "--output", "~/compared"]) == 0
    (home / "scratch").mkdir(exist_ok=True)
    scratch = ["--scratch-dir", "~/scratch"]
    assert run(["eval", "~/out", *LOCAL, "--dataset", "~/text.txt", *scratch]) == 0
    assert run(["plan", "~/model/config.json", "--seqlen", "32"]) == 0
    assert (home / "compared" / "compare.csv").exists()
    assert not any(Path.cwd().iterdir())


def test_home_in_yaml(home: Path) -> None:
    settings = {
        "executor": "local", "threads": 1, "nsamples": 4, "seqlen": 32, "method": "wanda",
        "dataset": "~/text.txt", "run_dir": "~/of-yaml", "no-report": True,
    }  # fmt: skip
    (home / "job.yaml").write_text(yaml.safe_dump(settings))
    assert run(["prune", "~/model", "~/out", "--config", "~/job.yaml"]) == 0
    assert (home / "of-yaml" / "run.json").exists()
    sweep = {
        "model": "~/model", "folder": "~/sweep", "vary": {"method": ["wanda"]},
        "prune": {k: v for k, v in settings.items() if k not in ("run_dir", "method")},
        "eval": {"dataset": "~/text.txt", "seqlen": 32, "nsamples": 2},
    }  # fmt: skip
    (home / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert run(["sweep", "--config", "~/sweep.yaml"]) == 0
    assert (home / "sweep" / "sweep.csv").exists()
    assert not any(Path.cwd().iterdir())
    assert read_yaml(home / "job.yaml")["run_dir"] == "~/of-yaml"


def test_a_name_that_begins_with_a_tilde(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Behind `./` it is a name; of a user that there is not, it is refused."""
    here = Path.cwd()
    shutil.move(home / "model", here / "~model")
    shutil.move(home / "text.txt", here / "~text.txt")
    options = [*QUICK, "--executor", "local", "--threads", "1", "--no-report"]
    arguments = ["prune", "./~model", "./~out", *options, "--dataset", "./~text.txt"]
    assert run(arguments) == 0
    check_output(here / "~model", here / "~out")
    for path in ("~nobody-here/out", "~nobody-here"):
        before = sorted(here.iterdir())
        assert run(["prune", "./~model", path, *options, "--dataset", "./~text.txt"]) == 2
        message = capfd.readouterr().err
        assert "there is no home of ~nobody-here; write ./~nobody-here" in message
        assert sorted(here.iterdir()) == before


def test_an_empty_path_is_none(
    tiny_model: TinyModel, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As of a variable that is not set: not the current folder."""
    text = write_text(tmp_path / "text.txt")
    for arguments in (
        ["prune", "", tmp_path / "out", *LOCAL, "--dataset", text],
        ["prune", tiny_model(), "", *LOCAL, "--dataset", text],
        ["prune", tiny_model(), tmp_path / "out", *LOCAL, "--dataset", ""],
        ["prune", tiny_model(), tmp_path / "out", *LOCAL, "--dataset", text, "--run-dir", " "],
        ["status", ""],
    ):
        refuse(arguments, tmp_path, capfd, "the path is empty")
