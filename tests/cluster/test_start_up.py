"""Help and refusals answer at once: none of the large libraries is imported for them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.command_line import COMMANDS

SCRIPT = """
import sys
from cluster.__main__ import main

LARGE = ("torch", "transformers", "ray", "pyarrow", "datasets", "numba", "matplotlib")
status = None
try:
    main()
except SystemExit as exit:
    status = exit.code
print("\\n", status, [name for name in LARGE if name in sys.modules])
"""
QUIET = """
import sys
from cluster.command_line import run

run(sys.argv[1:])
from transformers.utils import logging
print(logging.get_verbosity() == logging.ERROR, logging.is_progress_bar_enabled())
"""


@dataclass(frozen=True)
class Answer:
    """The exit status, what was printed, and which of the large libraries were imported."""

    status: str
    loaded: str
    out: str
    err: str


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> Path:
    """The working directory: a folder `model`, a text, and files that are wrong."""
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "broken.yaml").write_text("nsamples: {")
    (tmp_path / "unknown.yaml").write_text("nsampels: 4")
    sweeps = {
        "nothing": "model: model",
        "value": "model: model\nfolder: s\nvary: {nsamples: [0]}",
        "model": "model: ./none\nfolder: s\nvary: {nsamples: [4]}\nprune: {dataset: text.txt}",
        "text": "model: model\nfolder: s\nvary: {nsamples: [4]}\nprune: {dataset: none.txt}",
    }
    for name, text in sweeps.items():
        (tmp_path / f"sweep-{name}.yaml").write_text(text)
    return tmp_path


def python(script: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The script in a Python of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )


def answer(*arguments: str) -> Answer:
    """What `prox24 ARGUMENTS` says and imports."""
    done = python(SCRIPT, arguments)
    out, _, last = done.stdout.rstrip("\n").rpartition("\n")
    status, _, loaded = last.strip().partition(" ")
    return Answer(status, loaded, out, done.stderr)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(here: Path, command: str) -> None:
    shown = answer(*command.split(), "--help")
    assert (shown.status, shown.loaded, shown.err) == ("0", "[]", "")
    assert shown.out.startswith(f"usage: prox24 {command}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("prunne", "invalid choice: 'prunne'"),
        ("prune model", "the following arguments are required: OUTPUT"),
        ("prune model out --nsampels 4", "unrecognized arguments: --nsampels"),
        ("prune model out --nsamples many", "argument --nsamples: invalid int value: 'many'"),
        ("prune model out --nsamples 0", "--nsamples must be at least 1, not 0"),
        ("prune model out --shrinkage some", "--shrinkage must be a number"),
        ("prune model out --method alps", "invalid choice: 'alps'"),
        (
            "prune model out --config none.yaml",
            "--config none.yaml: No such file",
        ),
        (
            "prune model out --config broken.yaml",
            "--config broken.yaml is not a YAML",
        ),
        ("prune model out --config unknown.yaml", "unrecognized arguments: --nsampels=4"),
        ("prune ./none out --dataset text.txt", "./none is not a model folder"),
        ("prune text.txt out --dataset text.txt", "text.txt is not a model folder"),
        ("prune model out --dataset none.txt", "no such file: none.txt"),
        ("prune model out --dataset text.txt --eval-dataset none.txt", "no such file: none.txt"),
        ("prune model ftp://a/b --dataset text.txt", "ftp:// is not supported"),
        ("prune model s3://bucket --dataset text.txt", "name a bucket and a folder"),
        ("eval ./none --dataset text.txt", "./none is not a model folder"),
        ("eval model --dataset none.txt", "no such file: none.txt"),
        ("eval model --seqlen 1", "--seqlen must be at least 2"),
        ("eval model --tasks a --tasks-folder none", "--tasks-folder none is not a folder"),
        ("solve none.safetensors", "none.safetensors is not a file"),
        ("solve none.safetensors --methods alps", "--methods alps is not one of"),
        ("status none", "none.run beside it is the run directory"),
        ("report none", "none.run beside it is the run directory"),
        ("compare none", "none.run beside it is the run directory"),
        ("verify ./none --source model", "./none is not a model folder"),
        ("verify model --source ./none", "./none is not a model folder"),
        ("sweep --config none.yaml", "--config none.yaml: No such file"),
        ("sweep --config broken.yaml", "--config broken.yaml is not a YAML"),
        ("sweep --config sweep-nothing.yaml", "`folder` is missing"),
        ("sweep --config sweep-value.yaml", "--nsamples must be at least 1, not 0"),
        ("sweep --config sweep-model.yaml", "./none is not a model folder"),
        ("sweep --config sweep-text.yaml", "no such file: none.txt"),
        ("plan ./none", "./none is not a model folder"),
        ("plan model --gpus 8 --gpu-memory much", "--gpu-memory 'much' is not a size"),
        ("plan model --gpus 8 --gpu X1", "--gpu X1 is not known"),
        ("plan model --workers 2 --nodes 4", "--nodes 4 is more than the 2 workers"),
        ("plan model --rates none.json", "--rates none.json: No such file"),
        ("doctor --timeout 0", "--timeout must be at least 1"),
        ("doctor --executor local --open-dashboard", "--open-dashboard has no effect"),
        ("bench ./none", "./none is not a model folder"),
        ("bench model --batch-sizes some", "--batch-sizes must be numbers"),
    ],
)
def test_a_refusal(here: Path, arguments: str, message: str) -> None:
    before = sorted(here.rglob("*"))
    shown = answer(*arguments.split())
    assert message in " ".join(shown.err.split())
    assert (shown.status, shown.loaded, shown.out.strip()) == ("2", "[]", "")
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("verbose", [False, True])
def test_libraries_that_are_imported_later_are_quiet(
    here: Path, monkeypatch: pytest.MonkeyPatch, verbose: bool
) -> None:
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["sweep", "--config", "none.yaml", *["--verbose"] * verbose]
    assert python(QUIET, arguments).stdout.split() == [str(not verbose), str(verbose)]
