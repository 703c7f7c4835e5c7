"""A folder that is not the same one on every node is found before compute, and the node named."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.worker import Whereabouts
from cluster.dispatch.visibility import require_shared_view
from pipeline.messages import Job
from pipeline.output.write import recover
from pipeline.preflight.shared_folders import folders_of, what_is_not_seen
from storage.errors import OutputError, ResourceError
from storage.model.files import ModelFiles
from storage.run import shared_folders
from storage.run.directory import RunDirectory
from storage.run.lock import RunLock
from storage.run.shared_folders import Marked, SharedFolder, answer, marked, unanswered


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folders, "_PATIENCE_SECONDS", 0.0)


def elsewhere(mark: Marked, folder: Path) -> Marked:
    """What a node sees that has another folder at that path."""
    return dataclasses.replace(mark, place=str(folder / Path(mark.place).name))


@pytest.fixture
def folder(tmp_path: Path) -> SharedFolder:
    (tmp_path / "run").mkdir()
    return SharedFolder("the run directory", str(tmp_path / "run"), "marker-")


def test_a_shared_folder_leaves_no_complaint_and_no_trace(folder: SharedFolder) -> None:
    with marked([folder]) as marks:
        assert answer(marks, 0) == []
        assert unanswered(marks, 0) == []
        # A rank that has not answered is missed.
        assert len(unanswered(marks, 1)) == 1
    assert list(Path(folder.path).iterdir()) == []


def test_a_folder_of_the_same_name_on_another_disk(folder: SharedFolder, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with marked([folder]) as marks:
        (complaint,) = answer([elsewhere(marks[0], tmp_path / "other")], 1)
        assert complaint.startswith("does not see what the driver writes to the run directory")
        assert folder.path in complaint
        assert answer([elsewhere(marks[0], tmp_path / "absent")], 1) == [complaint]


def test_a_stale_copy_of_the_folder(folder: SharedFolder) -> None:
    """What was synchronized yesterday holds another word."""
    with marked([folder]) as marks:
        assert len(answer([dataclasses.replace(marks[0], word="another")], 1)) == 1


def test_a_folder_that_a_node_may_not_write_to(
    folder: SharedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    with marked([folder]) as marks:
        monkeypatch.setattr(Path, "write_text", refuse)
        (complaint,) = answer(marks, 0)
    assert "cannot write to the run directory" in complaint
    assert "Permission denied" in complaint


def test_a_node_whose_writing_does_not_arrive(folder: SharedFolder, tmp_path: Path) -> None:
    """It sees what the driver wrote, in a copy that is made one way."""
    with marked([folder]) as marks:
        other = tmp_path / "other"
        theirs = elsewhere(marks[0], other)
        Path(theirs.place).mkdir(parents=True)
        (Path(theirs.place) / "driver").write_text(marks[0].word)
        assert answer([theirs], 2) == []
        (complaint,) = unanswered(marks, 2)
    assert "what the driver does not see" in complaint


def test_a_folder_that_the_driver_itself_may_not_write_to(
    folder: SharedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError) as caught, marked([folder]):
        pass
    for text in ("the run directory", folder.path, "Read-only file system"):
        assert text in str(caught.value)


def where(node: str, address: str) -> Whereabouts:
    return Whereabouts(
        node=node, node_address=address, host="vm", address=address, pid=1, started=0.0
    )


def test_every_blind_node_is_named_once(folder: SharedFolder) -> None:
    places = {0: where("a", "10.0.0.1"), 1: where("b", "10.0.0.2"), 2: where("b", "10.0.0.2")}
    with marked([folder]) as marks:
        for rank in range(3):
            answer(marks, rank)
        require_shared_view(marks, {0: [], 1: [], 2: []}, places)
        with pytest.raises(ResourceError) as caught:
            require_shared_view(
                marks, {0: [], 1: ["does not see it"], 2: ["does not see it"]}, places
            )
    text = str(caught.value)
    assert text.count("node vm (10.0.0.2) does not see it") == 1
    assert "10.0.0.1" not in text
    assert f"the driver (on {socket.gethostname()})" in text


def job(source: Path, identity: str) -> Job:
    return Job(
        source=str(source), run_directory="", tokens_sha256="", rules=None, nsamples=1, seqlen=2,
        batch_size=1, dtype=None, device=None, threads=1,
        trust_remote_code=False, source_identity=identity,
    )  # fmt: skip


def test_the_model_may_be_a_copy_but_no_other(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, copy, other = tiny_model(), tiny_model(), tiny_model(blocks=1)
    identity = ModelFiles.open(model).identity()
    assert what_is_not_seen(job(copy, identity), (), 0) == []
    (complaint,) = what_is_not_seen(job(other, identity), (), 0)
    assert complaint == f"has another model at MODEL, {other}"
    (complaint,) = what_is_not_seen(job(tmp_path / "absent", identity), (), 0)
    assert "does not see MODEL" in complaint
    assert str(tmp_path / "absent") in complaint


def test_what_a_killed_check_leaves_is_swept(tmp_path: Path) -> None:
    """The names are those that the next owner of the run deletes."""
    run, output = RunDirectory(tmp_path / "out.run"), tmp_path / "out"
    run.path.mkdir()
    folders = folders_of(run, output)
    assert [f.path for f in folders] == [str(run.path), str(tmp_path)]
    with marked(folders) as marks:
        with RunLock(run.path) as lock:
            run.sweep_uncommitted()
            recover(output, run, lock)
        assert [mark for mark in marks if Path(mark.place).exists()] == []
