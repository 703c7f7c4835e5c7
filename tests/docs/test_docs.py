"""README and docs/: short enough, with links that lead somewhere and commands that parse."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.command_line import make_parser
from cluster.commands.sweep import sweep_from
from cluster.options import read_yaml
from pipeline.sweep.grid import read_plan
from tests.support.error_sites import errors_page
from tests.support.jobs import write_text
from tests.support.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "benchmarks" / "README.md", *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.M)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found: set[str] = set()
    for heading in HEADING.findall(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = sum(slug == known or known.startswith(f"{slug}-") for known in found)
        found.add(slug if slug not in found else f"{slug}-{number}")
    return found


def shell_lines(page: Path) -> Iterator[str]:
    """The commands in a page's shell blocks, continuation lines joined, without comments."""
    for kind, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if kind in ("bash", "sh", "shell", "console"):
            for line in body.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield shlex.join(words)


COMMANDS = [
    pytest.param(line, id=f"{page.name}:{number}")
    for page in PAGES
    for number, line in enumerate(shell_lines(page))
    if re.search(r"(^|-- )(prox24|python -m cluster) ", line)
]


def test_readme_is_one_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        ):
            broken.append(link)
    assert broken == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {link.partition("#")[0] for link in LINK.findall(index)}
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert pages <= linked


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line: str) -> None:
    """By the real parser: an option that was renamed fails here."""
    words = shlex.split(line)
    start = words.index("prox24") if "prox24" in words else words.index("cluster")
    make_parser().parse_args([word for word in words[start + 1 :] if word != "..."])


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("benchmarks/sweeps/*.yaml")), ids=lambda p: p.stem
)
def test_sweeps_parse(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(save_tiny_model(tmp_path / "model").parent)
    for name in ("calibration.txt", "evaluation.txt"):
        write_text(tmp_path / name)
    assert sweep_from(read_plan(read_yaml(path), path.name), path.name).points


def test_there_are_commands_to_parse() -> None:
    assert len(COMMANDS) > 15


def test_the_page_of_options_is_fresh() -> None:
    """`make docs` writes it."""
    made = runpy.run_path(str(ROOT / "docs" / "make_options.py"))["options_page"]()
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == made


def test_the_page_of_errors_is_fresh() -> None:
    """`make docs` writes it."""
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == errors_page()
