"""What commands print: at most 80 columns, colours and bars on terminals alone, the cursor back."""

from __future__ import annotations

import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import rich.console

from cluster.command_line import COMMANDS, run
from cluster.console import Console
from cluster.terminal import as_text, plain_table
from tests.support.jobs import prune_here, write_text
from tests.support.tiny_models import save_tiny_model

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3|38;5;|9)\d+m")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
# What is 80 columns at most is so whatever the terminal has.
TERMINALS = {
    "terminal": {"TERM": "xterm-256color", "COLUMNS": "200"},
    "no colour": {"TERM": "xterm-256color", "COLUMNS": "200", "NO_COLOR": "1"},
    "dumb": {"TERM": "dumb", "COLUMNS": "200"},
    "file": {"TERM": "xterm-256color", "COLUMNS": "200"},
}


class Stream(io.StringIO):
    """Standard output or error, of a terminal or not."""

    def __init__(self, tty: bool) -> None:
        super().__init__()
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


@dataclass(frozen=True)
class Printed:
    out: str
    err: str

    def lines(self) -> list[str]:
        """All that was ever on a line, bars written over included, without escapes."""
        return re.split(r"[\r\n]+", ESCAPE.sub("", self.out + self.err))


def printed(monkeypatch: pytest.MonkeyPatch, kind: str, *arguments: object) -> Printed:
    """What a command prints to a terminal of `kind`; it must succeed."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in TERMINALS[kind].items():
        monkeypatch.setenv(name, value)
    out, err = Stream(kind != "file"), Stream(kind != "file")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert run([str(argument) for argument in arguments]) == 0
    return Printed(out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two pruned ones, their run directories, a layer, and a text."""
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny_model(folder / "model")
    write_text(folder / "text.txt")
    for method in ("wanda", "magnitude"):
        prune_here(model, folder / method, method=method, save_layers="*.1.self_attn.k_proj")
    return folder


LOCAL = ("--executor", "local", "--threads", 1, "--seqlen", 32, "--nsamples", 6, "--batch-size", 2)


def everything(made: Path, output: Path) -> list[tuple[object, ...]]:
    """A command line of each command that runs here."""
    text = ("--dataset", made / "text.txt")
    layer = next((made / "wanda.run" / "layers").iterdir())
    return [
        ("prune", made / "model", output, "--method", "wanda", "--no-report", *LOCAL, *text),
        ("eval", made / "model", *LOCAL, *text),
        ("eval", made / "model", made / "wanda", *LOCAL, *text),
        ("verify", made / "wanda", "--source", made / "model"),
        ("solve", layer, "--methods", "magnitude,wanda", "--threads", 1),
        ("status", made / "wanda"),
        ("compare", made / "wanda", made / "magnitude"),
        ("plan", made / "model", "--workers", 2, "--seqlen", 32),
    ]


@pytest.mark.parametrize("kind", ["terminal", "file"])
def test_every_command(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for number, arguments in enumerate(everything(made, tmp_path / "output")):
        shown = printed(monkeypatch, kind, *arguments)
        # A path that alone is longer may stand on a line of its own: it can be copied.
        wide = [line for line in shown.lines() if len(line.rstrip()) > 80]
        assert [line for line in wide if not re.fullmatch(r"(wrote|report:) \S+", line)] == []
        if kind == "file":
            assert "\x1b" not in shown.out + shown.err, arguments[0]
            assert not re.search(r" $", shown.out + shown.err, re.MULTILINE), arguments[0]
        else:
            assert shown.err.rfind(SHOW) >= shown.err.rfind(HIDE), arguments[0]
            assert not COLOUR.search(shown.out) or arguments[0] == "status"
        if number < 4:
            assert (HIDE in shown.err) == (kind == "terminal"), arguments[0]


@pytest.mark.parametrize("kind", ["terminal", "no colour", "dumb", "file"])
def test_a_job_on_each_kind_of_terminal(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    shown = printed(monkeypatch, kind, *everything(made, tmp_path / "output")[0])
    assert shown.out == ""
    assert bool(COLOUR.search(shown.err)) == (kind == "terminal")
    lines = [line.rstrip() for line in shown.lines()]
    # Either a bar tells of each block, or a line.
    bars = kind in ("terminal", "no colour")
    assert bars == any("━" in line for line in lines)
    told = [line for line in lines if line.startswith("block 2/2 done in ")]
    assert len(told) == (0 if bars else 1)
    assert all("eta" in line for line in told)
    if kind == "file":
        assert "checking the weights" in lines
        assert lines.index("checking the weights") < lines.index("writing the model")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = Stream(False)
    monkeypatch.setattr(sys, "stdout", out)
    assert run([*command.split(), "--help"]) == 0
    text = out.getvalue()
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "default: None" not in text
    assert "default: False" not in text
    assert not re.search(r"\(default: ([^)]*)\)\s+\(default: \1\)", text)


def test_an_evaluation_without_a_terminal_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Now and then: six seconds a block here, and at least ten between two lines."""
    now = 0.0
    monkeypatch.setattr("cluster.console.time.monotonic", lambda: now)
    console = Console()
    err = io.StringIO()
    console.console = rich.console.Console(file=err, width=80)
    console.begin("evaluating", 6, 0)
    for block in range(6):
        console.phase("propagate", block)
        now += 6
    for phase in ("losses", "distances"):
        console.phase(phase)
        now += 60
    console.end()
    assert err.getvalue().splitlines() == [
        "evaluating: block 2/6 done  eta 0:24",
        "evaluating: block 4/6 done  eta 0:12",
        "evaluating: block 6/6 done  eta 0:00",
    ]


def test_long_names_are_folded_and_figures_are_not() -> None:
    table = plain_table(("layer", "figure"))
    table.add_row("[bold]" + "x" * 100, "123,456")
    text = as_text([table, "[red] is no colour but text"])
    assert max(map(len, text.splitlines())) <= 80
    assert "[bold]" in text
    assert "123,456" in text
    assert text.endswith("[red] is no colour but text\n")
