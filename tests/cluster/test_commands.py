"""A command is one module and one line of the table: the rest of the command line follows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cluster.command_line import COMMANDS, command_named, make_parser, run

TOY = """
from dataclasses import dataclass

from cluster.command import Command
from cluster.options import config_from
from pipeline.config.fields import option, require


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    times: int = option(2, "how often it is printed")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self):
        require(self, "times", at_least=1)


def add_arguments(parser):
    parser.add_argument("word", metavar="WORD", help="what is printed")


def run(options):
    config = config_from(options, ToyConfig)
    if options.word == "wait":
        raise KeyboardInterrupt("SIGTERM")
    print(" ".join([options.word] * config.times))
    return 4


COMMAND = Command(
    name="toy",
    help="print a WORD",
    epilog="Exit status 4: always.",
    config=ToyConfig,
    arguments=add_arguments,
    run=run,
    resumes="printed words",
)
"""


@pytest.fixture
def _toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prox24 toy`, added as any command is: a module, and a line of the table."""
    (tmp_path / "toy_command.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_command", raising=False)
    monkeypatch.setitem(COMMANDS, "toy", "toy_command")


@pytest.mark.usefixtures("_toy")
def test_a_new_command_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["toy", "ding"]) == 4
    assert run(["toy", "ding", "--times", "3"]) == 4
    file = tmp_path / "toy.yaml"
    file.write_text("times: 1\n")
    assert run(["toy", "ding", "--config", str(file)]) == 4
    assert capsys.readouterr().out == "ding ding\nding ding ding\nding\n"


@pytest.mark.usefixtures("_toy")
def test_a_new_command_has_help_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "toy print a WORD" in lines
    assert run(["toy", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("Print a WORD.", "--times TIMES", "(default: 2)", "--config", "status 4: always"):
        assert part in shown
    assert run(["toy", "ding", "--times", "0"]) == 2
    assert capsys.readouterr().err == "prox24: --times must be at least 1, not 0\n"
    assert run(["toy"]) == 2
    assert capsys.readouterr().err.startswith("prox24 toy: the following arguments are required")


@pytest.mark.usefixtures("_toy")
def test_a_new_command_that_resumes_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["toy", "wait", "--times", "5"]) == 130
    assert capsys.readouterr().err == (
        "prox24: stopped by SIGTERM\n"
        "prox24: printed words are kept; go on with: prox24 toy wait --times 5\n"
    )


def test_every_command_is_listed_by_its_name() -> None:
    assert [command_named(name).name for name in COMMANDS] == list(COMMANDS)
    help = make_parser().format_help()
    for name in COMMANDS:
        assert command_named(name).help in " ".join(help.split())


def test_only_the_command_that_is_named_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in COMMANDS if name != "status"]:
        monkeypatch.setitem(COMMANDS, name, "no.such.module")
    assert run(["status", "--help"]) == 0
