"""What a refused command must be: exit code 2, one line that names it, and nothing created."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.command_line import run
from tests.support.jobs import contents

LOCAL = ("--executor", "local", "--threads", "1", "--seqlen", "32", "--batch-size", "2")


def refuse(
    arguments: list[Any], folder: Path, capfd: pytest.CaptureFixture[str], *names: str
) -> None:
    """Exit code 2, one line that names the thing, and nothing created or changed below `folder`."""
    before = contents(folder), sorted(folder.rglob("*"))
    capfd.readouterr()
    status = run([str(argument) for argument in arguments])
    shown = capfd.readouterr()
    assert status == 2, shown.err
    assert shown.out == ""
    assert "Traceback" not in shown.err
    assert "unexpected" not in shown.err
    (line,) = [line for line in shown.err.splitlines() if line.startswith("prox24")]
    assert shown.err.splitlines()[-1] == line
    for name in names:
        assert name in line
    assert (contents(folder), sorted(folder.rglob("*"))) == before
