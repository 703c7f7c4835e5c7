"""The report of a whole job: what is in it, that it stands alone, and that it harms no job."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pyarrow.parquet as pq
import pytest

import pipeline.reporting.page
import pipeline.reporting.write as write
from cluster.command_line import run
from pipeline.config.pattern import Pattern
from pipeline.config.prune import PruneConfig
from pipeline.loop.rank import Call
from pipeline.messages import Outcome
from pipeline.prune import PruneResult, prune
from pipeline.runtime.progress import Silent
from pipeline.solvers.masks import keep_mask
from pipeline.worker.local_executor import LocalExecutor
from storage.errors import RunDirectoryError, WorkerLostError
from tests.support.jobs import SMALL, contents, prune_here, tensors, write_text
from tests.support.tiny_models import save_tiny_model

# A name that breaks pages, links and formulas that do not escape it.
NAME = "<script>alert(1)</script>&$x^$"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def job(folder: Path, progress: Silent, **options: Any) -> PruneResult:
    """A job of two blocks on two ranks, whose source has a bad name."""
    source = save_tiny_model(folder / "model", blocks=2, hidden=16, intermediate=32)
    text = write_text(folder / "text.txt")
    config = PruneConfig(
        executor="local", workers=2, dataset=str(text), **(SMALL | {"no_report": False} | options)
    )
    return prune(
        source, folder / "out", config, lambda: LocalExecutor(2, 1), progress, source_name=NAME
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished job: model, out, out.run."""
    folder = tmp_path_factory.mktemp("report")
    progress = Notes()
    job(folder, progress)
    assert progress.notes == []
    return folder


class Page(HTMLParser):
    """A page's text, the sources of its images, its headings, and all attributes."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text, self.images, self.tags = "", [], []  # type: ignore[var-annotated]
        self.attributes: list[tuple[str, str]] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        own = {name: value or "" for name, value in attrs}
        self.attributes += own.items()
        if tag == "img":
            assert own["alt"]
            self.images.append(own["src"])

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    return Page(whole / "out.run" / "report" / "report.html")


def test_the_page_tells_everything(whole: Path, page: Page) -> None:
    results = json.loads((whole / "out" / "prox24.json").read_text())
    worst = max(results["layers"], key=lambda entry: float(entry["relative_error"]))
    words = " ".join(page.text.split())
    for text in (
        "14 linear layers in 2 blocks",
        "of every 4 neighbouring weights at most 2 are not zero",
        f"{worst['relative_error']:.2g} % in the worst, {worst['name']}",
        "8 × 32 tokens of text.txt",
        "2 workers on 1 host",
        "Nothing failed on the way.",
        "other phases: reading text",
        "What to try next",
        "kind of layer inputs always 0 never kept rarely often with their norm",
        "prox24 eval MODEL OUTPUT",  # its perplexity was not measured
        "prox_admm",
        results["environment"]["torch"],
        results["job"]["dataset"]["sha256"],
        *(file["sha256"] for file in results["weight_files"]),
        *{f"{entry['relative_error']:.3f}" for entry in results["layers"]},
    ):
        assert text in words, text
    assert re.search(r"writing the model \d+ (s|min \d+ s)\. ", words)
    assert len(page.images) == 5


def test_the_figures_are_drawings_that_name_what_they_show(page: Page) -> None:
    texts = []
    for image in page.images:
        kind, _, data = image.partition(",")
        assert kind == "data:image/svg+xml;base64"
        root = ElementTree.fromstring(base64.b64decode(data))
        texts.append(" ".join("".join(text.itertext()) for text in root.iter() if text.text))
    depth, kinds, masks, times, workers = texts
    for text in (depth, kinds, masks):
        assert "mlp.up_proj" in text
        assert "\\mathdefault" not in text
    assert "whole block" in depth
    assert "■■□□" in masks
    for phase in ("embed", "calibrate", "reduce", "solve", "advance"):
        assert phase in times
        assert phase in workers
    assert "worker 1 on " in workers


def test_the_page_stands_alone(page: Page) -> None:
    """No script, nothing that is fetched, and a policy that would forbid both."""
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not [value for name, value in page.attributes if name in ("href", "srcset", "action")]
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    policies = [value for name, value in page.attributes if value.startswith("default-src 'none'")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert NAME in page.text  # as text


def test_the_template_goes_into_the_wheel(repository: Path) -> None:
    """The template lies in the package, and pyproject.toml names it as package data."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["pipeline.reporting"]
    folder = Path(pipeline.reporting.page.__file__).parent
    packed = {path.name for pattern in patterns for path in folder.glob(pattern)}
    assert pipeline.reporting.page.TEMPLATE_NAME in packed


def test_the_table_has_every_layer_and_what_its_mask_is(whole: Path) -> None:
    rows = pq.read_table(whole / "out.run" / "report" / "report.parquet").to_pylist()
    results = json.loads((whole / "out" / "prox24.json").read_text())
    assert [row["name"] for row in rows] == [entry["name"] for entry in results["layers"]]
    dense, pruned = dict(tensors(whole / "model")), dict(tensors(whole / "out"))
    for row, entry in zip(rows, results["layers"], strict=True):
        for key in ("relative_error", "objective", "damping", "iterations", "deviations"):
            assert row[key] == entry[key]
        weight = pruned[f"{row['name']}.weight"]
        kept = weight != 0
        by_magnitude = keep_mask(Pattern.parse("2:4"), dense[f"{row['name']}.weight"].abs())
        assert [row["rows"], row["columns"]] == list(weight.shape)
        assert row["weights"] == weight.numel()
        assert row["kept"] == int(kept.sum())
        assert row["magnitude_too"] == int((kept & by_magnitude).sum())
        assert row["magnitude_share"] == row["magnitude_too"] / row["kept"]
        assert sum(count for _, count in row["groups"]) == weight.numel() // 4


def test_times_add_up(whole: Path) -> None:
    """The timeline and the phases tell of the same work as the totals."""
    summary = json.loads((whole / "out.run" / "report" / "summary.json").read_text())
    phases = [phase for block in summary["blocks"] for phase in block["phases"].values()]
    assert sum(phase["seconds"] for phase in phases) == pytest.approx(summary["wall"])
    spans = summary["timeline"]
    assert sum(span["seconds"] for span in spans) == pytest.approx(summary["wall"], abs=0.01)
    assert spans == sorted(spans, key=lambda span: float(span["start"]))
    assert {span["phase"] for span in spans} == {
        "embed", "calibrate", "reduce", "solve", "advance"
    }  # fmt: skip
    for number, worker in enumerate(summary["workers"]):
        busy = sum(s["busy"][s["workers"].index(number)] for s in spans if number in s["workers"])
        assert busy == pytest.approx(sum(worker["seconds"].values()), abs=0.02)


def test_made_again_without_the_models(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "out.run", tmp_path / "out.run")
    report = tmp_path / "out.run" / "report"
    before = contents(report)
    for name in ("report.html", "report.parquet"):
        (report / name).unlink()
    assert run(["report", str(tmp_path / "out")]) == 0
    assert str(report / "report.html") in capsys.readouterr().out
    after = contents(report)
    assert after.keys() == before.keys()
    assert after["report.parquet"] == before["report.parquet"]
    moved = after["report.html"].replace(str(tmp_path).encode(), str(whole).encode())
    assert moved == before["report.html"]


def test_a_job_that_is_not_finished_has_no_report(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "out.run", tmp_path / "out.run")
    shutil.rmtree(tmp_path / "out.run" / "report")
    status = json.loads((tmp_path / "out.run" / "status.json").read_text())
    assert status["output"] == str(whole / "out")
    (tmp_path / "out.run" / "status.json").unlink()
    assert run(["report", str(tmp_path / "out.run")]) == 2
    error = capsys.readouterr().err
    assert "no finished job" in error
    assert error.count("\n") == 1
    assert run(["report", str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize("name", ["summary.json", "result.json"])
def test_damage_is_one_line(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copytree(whole / "out.run", tmp_path / "out.run")
    path = tmp_path / "out.run" / "report" / name
    path.write_bytes(path.read_bytes().replace(b"prox_admm", b"prox_adxm"))
    assert run(["report", str(tmp_path / "out.run")]) == 2
    error = capsys.readouterr().err
    assert name in error
    assert error.count("\n") == 1


def test_a_report_that_fails_is_one_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Path:
        raise MemoryError("no\nroom")

    monkeypatch.setattr(write, "make_report", fail)
    progress = Notes()
    result = job(tmp_path, progress)
    assert progress.notes == ["no report was made (no room); the output is whole"]
    assert json.loads((result.output / "prox24.json").read_text())["layers"]  # type: ignore[operator]
    assert not (result.run_directory / "report" / "report.html").exists()
    monkeypatch.undo()
    # The same command, which finds the output whole, makes it.
    again = job(tmp_path, progress)
    assert (again.run_directory / "report" / "report.html").exists()
    assert len(progress.notes) == 1


def test_who_was_displaced_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no matter of the report, and is not hidden by it."""

    def fail(run: Any, *_: Any) -> Path:
        for lock in run.path.glob("lock-*.json"):
            lock.unlink()
        raise OSError("gone")

    monkeypatch.setattr(write, "make_report", fail)
    with pytest.raises(RunDirectoryError):
        job(tmp_path, Notes())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "magnitude"},
        {"method": "wanda", "pattern": "unstructured:0.5"},
        {"method": "sparsegpt", "pattern": "4:8"},
    ],
)
def test_other_jobs_have_reports_too(
    tiny_model: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    text = write_text(tmp_path / "evaluated.txt", 256, seed=1)
    result = prune_here(
        tiny_model("llama", blocks=1), tmp_path / "out", eval_dataset=str(text), no_report=False,
        **options,
    )  # fmt: skip
    found = Page(result.run_directory / "report" / "report.html")
    assert len(found.images) == 5
    assert "Its perplexity on evaluated.txt is " in found.text
    assert "prox24 eval MODEL OUTPUT" not in found.text
    if options["method"] == "magnitude":
        assert "would have kept 100.0 % of them, too" in found.text


def test_layers_with_patterns_and_methods_of_their_own(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """One kind has another pattern than the rest, and one has two."""
    overrides = "*.o_proj=wanda,4:8; *.0.mlp.up_proj=4:8"
    result = prune_here(tiny_model("llama"), tmp_path / "out", override=overrides, no_report=False)
    text = " ".join(Page(result.run_directory / "report" / "report.html").text.split())
    assert "pruned to 2:4 and 4:8" in text
    assert "were pruned by prox_admm and wanda: of every 4 neighbouring weights at most 2" in text


class Losing(LocalExecutor):
    """Loses its workers once, in the second block."""

    lost = False

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        if calls[0].phase == "solve" and calls[0].block == 1 and not self.lost:
            self.lost = True
            raise WorkerLostError("worker 1 <b>is gone</b>")
        return super().run(calls)


def test_what_failed_on_the_way(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    result = prune_here(
        tiny_model("llama"), tmp_path / "out", executor=Losing(1, 1), no_report=False
    )
    text = " ".join(Page(result.run_directory / "report" / "report.html").text.split())
    assert "1 attempt failed on the way and the work was done again" in text
    assert "block 1 WorkerLostError: worker 1 <b>is gone</b>" in text


@pytest.fixture
def screenshot(whole: Path, tmp_path: Path) -> tuple[Any, str]:
    """What headless Chromium draws of the page, (height, width, 3) from 0 to 1, and what it says.

    It reaches no network: every host name is unknown to it.
    """
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,5000",
            f"--screenshot={picture}", (whole / "out.run/report/report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return matplotlib.image.imread(picture)[:, :, :3], done.stderr


def test_chromium_shows_it(screenshot: tuple[Any, str]) -> None:
    """All figures are drawn, text is dark on white, nothing runs over the page's right edge."""
    picture, said = screenshot
    assert picture.shape == (5000, 1200, 3)
    assert not re.findall(r"CONSOLE.*", said)  # neither errors nor anything that the policy forbids

    def rows_with(colour: str) -> int:
        wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return int((np.abs(picture - wanted).max(axis=2) < 0.02).any(axis=1).sum())

    # The first colour is in every figure: lines, points, bars of positions, of time, of workers.
    assert rows_with("#0072B2") > 200
    assert rows_with("#8C6D31") > 100  # the phase "solve", in both figures of time
    assert (picture[:60].min(axis=2) < 0.2).any()  # the title
    assert np.all(picture[:, -40:] == 1)
