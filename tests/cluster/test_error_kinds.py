"""Every kind of message that the command line ends with: its exit code, one line, its words.

docs/errors.md lists the messages. Each is provoked here by a command line, or asserted by another
test, or listed with a reason in tests/support/unprovoked.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.command_line import run
from tests.support.error_rows import ROWS, Row
from tests.support.error_sites import asserted_elsewhere, error_kinds, error_sites
from tests.support.jobs import write_text
from tests.support.unprovoked import UNPROVOKED


def sites_of(row: Row) -> list[object]:
    return [site for site in error_sites() if site.module == row.module and row.says in site.text]


@pytest.mark.parametrize("case", ROWS)
def test_a_message(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    case: str,
) -> None:
    row = ROWS[case]
    tiny_model().rename(tmp_path / "model")
    text = write_text(tmp_path / "text.txt")
    for name, content in row.files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            content = content.replace("{d}", str(tmp_path)).encode()
        path.write_bytes(content)
    places = {"{d}": tmp_path, "{model}": tmp_path / "model", "{text}": text}
    first, arguments = row.first, row.arguments
    for name, place in places.items():
        first = first.replace(name, str(place))
        arguments = arguments.replace(name, str(place))
    if first:
        assert run(shlex.split(first)) == 0
    row.prepare(tmp_path)
    capfd.readouterr()
    status = run(shlex.split(arguments))
    shown = capfd.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("prox24")]
    assert len(lines) == 1, shown.err
    assert shown.err.splitlines()[-1] == lines[0]
    assert lines[0].startswith(("prox24: ", f"prox24 {shlex.split(arguments)[0]}: "))
    assert "Traceback" not in shown.err
    assert "unexpected" not in lines[0]
    made = [site for site in sites_of(row) if site.matches(lines[0])]
    assert made, lines[0]
    assert {error_kinds()[site.kind].exit_code for site in made} == {status}
    assert row.first or not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("case", ROWS)
def test_a_row_is_of_one_line_of_the_sources(case: str) -> None:
    assert len({site.line for site in sites_of(ROWS[case])}) == 1


def test_every_message_is_accounted_for() -> None:
    provoked = asserted_elsewhere()
    for row in ROWS.values():
        provoked.update(sites_of(row))
    listed = [entry for entries in UNPROVOKED.values() for entry in entries]
    unknown = [
        entry
        for entry in listed
        if not any(f"{site.module}: {site.text}".startswith(entry) for site in error_sites())
    ]
    stale = [
        entry
        for entry in listed
        if all(
            site in provoked
            for site in error_sites()
            if f"{site.module}: {site.text}".startswith(entry)
        )
    ]
    missing = [
        f"{site.module}: {site.text}"
        for site in error_sites()
        if site not in provoked
        and not any(f"{site.module}: {site.text}".startswith(entry) for entry in listed)
    ]
    assert unknown == [], "tests/support/unprovoked.py lists what is no message any more"
    assert stale == [], "tests/support/unprovoked.py lists what a test names"
    assert missing == [], "messages that no test provokes"


def test_every_class_makes_a_message_that_a_test_names() -> None:
    provoked = asserted_elsewhere().union(*map(sites_of, ROWS.values()))
    # RunInterrupted's message is the signal's name: tests/cluster and tests/job send signals.
    # The other two end phases of Ray's workers: tests/ray kills workers, and looks at the class.
    # FileError's words are the system's: tests/job/test_file_faults.py makes every file of a job
    # unusable, and looks for its path and a remedy.
    kinds = set(error_kinds()) - {"RunInterrupted", "WorkerLostError", "Prox24Error", "FileError"}
    assert kinds - {site.kind for site in provoked} == set()
