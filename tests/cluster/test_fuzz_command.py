"""The whole `prune` command on hostile files: one line and an exit code, never a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.command_line import run as command
from pipeline.loop.rank import Call
from pipeline.messages import Outcome
from pipeline.worker.local_executor import LocalExecutor
from storage.errors import Prox24Error
from tests.support.hostile import documents, dump, examples, spoiled
from tests.support.jobs import contents, prune_here, write_text
from tests.support.tiny_models import save_tiny_model

OPTIONS = {"method": "wanda", "nsamples": 4, "seqlen": 16, "threads": 1, "reconstruct": "auto"}


class Stopped(LocalExecutor):
    """Ends the job in its second block."""

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        if calls[0].phase == "solve" and calls[0].block == 1:
            raise Prox24Error("stopped")
        return super().run(calls)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, the output of a job, and another job's that has begun."""
    folder = tmp_path_factory.mktemp("fuzz-command")
    model = save_tiny_model(folder / "model", hidden=8, intermediate=8, weight_files=2)
    text = str(write_text(folder / "text.txt", 4096))
    prune_here(model, folder / "expected", dataset=text, **OPTIONS)
    with pytest.raises(Prox24Error):
        prune_here(model, folder / "output", executor=Stopped(1, 1), dataset=text, **OPTIONS)
    return folder


def changed_file(data: st.DataObject, path: Path) -> bytes:
    raw = path.read_bytes()
    if path.suffix == ".json" and data.draw(st.booleans()):
        return dump(data.draw(documents(json.loads(raw)))).encode("utf-8", "surrogatepass")
    return data.draw(spoiled(raw))


@examples(12)
@given(data=st.data())
def test_prune(begun: Path, data: st.DataObject) -> None:
    files = [
        path.relative_to(begun)
        for part in ("model", "output.run")
        for path in sorted((begun / part).rglob("*"))
        if path.is_file()
    ]
    spoiled_file = data.draw(st.sampled_from(files))
    work = begun.parent / "fuzz-command-work"
    shutil.copytree(begun, work, symlinks=True)
    try:
        (work / spoiled_file).write_bytes(changed_file(data, work / spoiled_file))
        arguments = ["prune", work / "model", work / "output", "--dataset", work / "text.txt"]
        arguments += ["--executor=local", "--batch-size=2", "--no-report"]
        arguments += [f"--{key}={value}" for key, value in OPTIONS.items()]
        outside = contents(begun)
        shown = io.StringIO()
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
            status = command([str(argument) for argument in arguments])
        assert "unexpected" not in shown.getvalue(), shown.getvalue()
        assert "Traceback" not in shown.getvalue()
        assert status in (0, 1, 2)
        if status == 0 and spoiled_file.parts[0] == "output.run":
            weights = {n: r for n, r in contents(begun / "expected").items() if "model-" in n}
            assert {n: r for n, r in contents(work / "output").items() if n in weights} == weights
        assert (work / "output").exists() == (status == 0)
        assert contents(begun) == outside
    finally:
        shutil.rmtree(work)
