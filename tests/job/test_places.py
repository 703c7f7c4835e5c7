"""Where a job may not write: found before anything is computed, by trying it; nothing is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from cluster.command_line import run
from pipeline.output.write import partial_prefix
from storage.errors import OutputError
from storage.files.names import stem_of
from storage.files.trial import require_file, try_replacing
from storage.run.directory import SCRATCH_PREFIX, RunDirectory
from tests.support.disks import Disk, fails, in_a_process, without_rights
from tests.support.jobs import check_output, contents, prune_here, write_text
from tests.support.refusals import LOCAL, refuse

TinyModel = Callable[..., Path]
QUICK = ("--method", "wanda", "--nsamples", "4", "--no-report")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def prune(model: Path, output: str | Path, text: Path, *options: str | Path) -> list[str]:
    arguments = ["prune", model, output, *LOCAL, *QUICK, "--dataset", text, *options]
    return [str(argument) for argument in arguments]


# -- refused --------------------------------------------------------------------------------------

NAME_256, NAME_253 = "n" * 256, "é" * 126 + "x"
# OUTPUT and further options, relative to the folder that holds `model`, and what the message names.
PLACES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "the current folder": (".", (), ("OUTPUT", "current folder")),
    "and with a slash": ("./", ("--overwrite",), ("OUTPUT", "current folder")),
    "the one above": ("..", ("--overwrite",), ("OUTPUT", "current folder")),
    "the root": ("/", ("--overwrite",), ("OUTPUT /", "root")),
    "under a file": ("text.txt/out", (), ("text.txt is not a folder", "OUTPUT")),
    "far under a file": ("text.txt/a/b/out", (), ("text.txt is not a folder",)),
    "a file with a slash": ("text.txt/", (), ("text.txt is a file",)),
    "in MODEL": ("model/out", (), ("lies in the source model",)),
    "in MODEL, by a link": ("link/out", (), ("lies in the source model",)),
    "MODEL in it": ("model/..", ("--overwrite",), ("OUTPUT",)),
    "the run directory in MODEL": ("out", ("--run-dir", "model/run"), ("--run-dir",)),
    "the run directory in OUTPUT": ("out", ("--run-dir", "out/a/run"), ("--run-dir",)),
    "OUTPUT in the run directory": ("run/out", ("--run-dir", "run"), ("--run-dir",)),
    "the run directory under a file": (
        "out", ("--run-dir", "text.txt/run"), ("--run-dir", "text.txt is not a folder"),
    ),
    "a name of 256 bytes": (NAME_256, ("--run-dir", "run"), ("OUTPUT", "256 bytes", "255")),
    "no room for .run": (NAME_253, (), ("257 bytes", "255", "--run-dir")),
    "a path of 5000 bytes": ("/".join(["d" * 99] * 50), (), ("4096 bytes",)),
    "links in a circle": ("circle/out", (), ("circle", "OUTPUT")),
    "the trace in OUTPUT": ("out", ("--trace", "out/trace.json"), ("--trace", "OUTPUT")),
    "the trace in no folder": ("out", ("--trace", "none/trace.json"), ("--trace", "none")),
    "the scratch in OUTPUT": ("out", ("--scratch-dir", "{here}/out/s"), ("--scratch-dir",)),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_cannot_be(
    tiny_model: TinyModel,
    tmp_path: Path,
    text: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    tiny_model().rename(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "circle").symlink_to("circle")
    monkeypatch.chdir(tmp_path)
    output, options, names = PLACES[place]
    options = tuple(option.format(here=tmp_path) for option in options)
    refuse(prune(Path("model"), output, text, *options), tmp_path, capfd, *names)


# -- allowed --------------------------------------------------------------------------------------

ALLOWED = {
    "250 bytes": ("é" * 125, ()),
    "255 bytes": ("n" * 255, ("--run-dir", "n" * 254 + "r")),
    "through a folder above": ("none/../out", ()),
    "far down": ("a/b/c/out", ()),
    "empty": ("empty/", ()),
    "a link to a folder that is to come": ("link", ()),
    "a link to another file system": ("shm", ()),
}


@pytest.mark.parametrize("place", ALLOWED)
def test_a_place_that_can_be(
    tiny_model: TinyModel,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    model = tiny_model()
    (tmp_path / "empty").mkdir()
    (tmp_path / "none").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    shm = Path(f"/dev/shm/prox24-test-{os.getpid()}")
    (tmp_path / "shm").symlink_to(shm)
    monkeypatch.chdir(tmp_path)
    output, options = ALLOWED[place]
    try:
        assert run(prune(model, output, text, *options)) == 0
        check_output(model, Path(output))
        assert not list(tmp_path.rglob(".*"))
        assert not list(shm.parent.glob(".prox24-test-*"))
    finally:
        subprocess.run(["rm", "-rf", shm], check=True)


def test_weight_files_with_names_as_long_as_they_may_be(
    tiny_model: TinyModel, tmp_path: Path, text: Path
) -> None:
    """Also while they are written, under hidden names."""
    model = tiny_model()
    name = f"{'w' * 243}.safetensors"
    (model / "model.safetensors").rename(model / name)
    with safe_open(model / name, "pt") as file:
        weight_map = dict.fromkeys(file.keys(), name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / ("t" * 255)).write_text("a side file")
    assert run(prune(model, tmp_path / "output", text)) == 0
    check_output(model, tmp_path / "output")


def test_hidden_names_of_long_names_are_short_and_their_own() -> None:
    names = ["n" * 60, "n" * 61, "n" * 62, "é" * 120, "é" * 121, "中" * 85]
    stems = [stem_of(name) for name in names]
    assert stems[0] == names[0]
    assert len(set(stems)) == len(stems)
    for stem in stems:
        assert len(os.fsencode(stem)) <= 60
    odd = os.fsdecode(b"\xff" * 100)
    assert stem_of(odd).isascii()  # what cannot be cut by characters is left out


# -- rights, mounts, full disks: in a process that may mount, or has lost root's rights ------------


def not_writable(log: Path, model: Path, folder: Path, text: Path) -> None:
    """The folder of OUTPUT, then the run directory, then one inside it; an output of another."""
    shut, open_ = folder / "shut", folder / "open"
    for path in (shut, open_):
        path.mkdir()
    if not os.geteuid():
        os.chown(shut, 12345, 12345)  # another user's, with the usual mode
    os.chmod(shut, 0o555 if os.geteuid() else 0o755)
    without_rights()
    before = contents(folder)
    message = fails(log, prune(model, shut / "out", text))
    assert re.search(r"user \d+ may not write to .*shut \(Permission denied\); choose", message)
    message = fails(log, prune(model, shut / "out", text, "--run-dir", open_ / "run"))
    assert f"OUTPUT {shut / 'out'} cannot be written" in message
    message = fails(log, prune(model, open_ / "out", text, "--run-dir", shut / "run"))
    assert "--run-dir" in message
    message = fails(log, prune(model, open_ / "o", text, "--trace", shut / "trace"))
    assert "--trace" in message
    assert contents(folder) == before
    assert not any(open_.iterdir())


def of_another_in_a_shared_folder(log: Path, model: Path, folder: Path, text: Path) -> None:
    """As in /tmp: all may write there, but only the owner may rename or remove."""
    shared = folder / "shared"
    shared.mkdir()
    for name in ("empty", "full"):
        (shared / name).mkdir()
        os.chmod(shared / name, 0o777)
        os.chown(shared / name, 12345, 12345)
    (shared / "full" / "precious").write_text("theirs")
    os.chown(shared, 12345, 12345)
    os.chmod(shared, 0o1777)
    without_rights()
    for name in ("empty", "full"):
        message = fails(log, prune(model, shared / name, text, "--overwrite"))
        assert f"OUTPUT {shared / name} cannot be written" in message
        assert "may not write" in message
    assert contents(shared) == {"full/precious": b"theirs"}
    assert sorted(p.name for p in shared.iterdir()) == ["empty", "full"]


def left_by_another(log: Path, model: Path, folder: Path, text: Path) -> None:
    """A job that root began, say: its own folders in the run directory."""
    assert run(prune(model, folder / "out", text)) == 0
    (folder / "out" / "prox24.json").unlink()
    os.chmod(folder / "out.run" / "checkpoints", 0o555)
    without_rights()
    message = fails(log, prune(model, folder / "out", text, "--overwrite"))
    assert "the run directory of OUTPUT" in message
    assert "out.run/checkpoints" in message
    os.chmod(folder / "out.run" / "checkpoints", 0o755)
    (folder / "out" / "inner").mkdir()
    os.chmod(folder / "out" / "inner", 0o555)  # what it holds could not be deleted
    message = fails(log, prune(model, folder / "out", text, "--overwrite"))
    assert "out/inner" in message


def read_only(log: Path, model: Path, folder: Path, text: Path) -> None:
    disk = Disk(folder / "disk")
    (disk.folder / "out").mkdir()
    disk.make_read_only()
    for output in ("new", "out", "a/b/c"):
        message = fails(log, prune(model, disk.folder / output, text))
        assert "is on a file system that is read-only; choose another OUTPUT" in message
    arguments = prune(model, disk.folder / "new", text, "--run-dir", folder / "run")
    assert f"OUTPUT {disk.folder / 'new'} cannot be written" in fails(log, arguments)
    assert not (folder / "run").exists()


def mounted(log: Path, model: Path, folder: Path, text: Path) -> None:
    """OUTPUT is where a disk is mounted: it can be neither renamed nor replaced."""
    disk = Disk(folder / "disk")
    message = fails(log, prune(model, disk.folder, text))
    assert f"{disk.folder} is a mount point, which cannot be replaced; choose another" in message
    (disk.folder / "file").touch()
    message = fails(log, prune(model, disk.folder, text, "--overwrite"))
    assert "is a mount point" in message
    assert [p.name for p in disk.folder.iterdir()] == ["file"]
    assert run(prune(model, disk.folder / "out", text)) == 0


def full(log: Path, model: Path, folder: Path, text: Path) -> None:
    disk = Disk(folder / "disk")
    disk.fill()
    arguments = prune(model, disk.folder / "out", text, "--run-dir", folder / "run")
    message = fails(log, arguments)
    assert f"{disk.folder / 'out'}: not written, No space left on device; make room" in message
    assert not (folder / "run").exists()
    assert [p.name for p in disk.folder.iterdir()] == ["ballast"]


@pytest.mark.parametrize(
    "case", [not_writable, of_another_in_a_shared_folder, left_by_another, read_only, mounted, full]
)
def test_what_the_system_does_not_allow(
    tiny_model: TinyModel,
    tmp_path: Path,
    text: Path,
    case: Callable[[Path, Path, Path, Path], None],
) -> None:
    if case is of_another_in_a_shared_folder and os.geteuid():
        pytest.skip("only root can make another user's folder")
    (folder := tmp_path / "job").mkdir()
    in_a_process(case, tmp_path / "log", tiny_model(), folder, text)


def others(log: Path, model: Path, folder: Path, text: Path) -> None:
    """Whatever another command writes at its end."""
    runs = []
    for method in ("wanda", "magnitude"):
        prune_here(model, folder / method, dataset=str(text), method=method)
        runs.append(str(folder / f"{method}.run"))
    layer = folder / "layer.safetensors"
    save_file({"weight": torch.randn(4, 8), "inputs": torch.randn(2, 8, 8)}, layer)
    sweep = {"model": str(model), "folder": str(folder / "shut" / "sweep"),
             "prune": {"executor": "local", "dataset": str(text), "seqlen": 32, "nsamples": 4},
             "eval": {"dataset": str(text), "seqlen": 32},
             "vary": {"method": ["wanda", "magnitude"]}}  # fmt: skip
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    (folder / "shut").mkdir()
    os.chmod(folder / "shut", 0o555)
    os.chmod(folder / "wanda.run" / "report", 0o555)
    without_rights()
    before = contents(folder)
    shut = str(folder / "shut" / "new")
    evaluate = ["eval", str(model), *LOCAL, "--dataset", str(text), "--scratch-dir"]
    for arguments, name in (
        ([*evaluate, str(folder / "shut")], "--scratch-dir"),
        ([*evaluate, shut], "--scratch-dir"),
        (["compare", *runs, "--output", shut], "--output"),
        (["solve", str(layer), "--output", shut], "--output"),
        (["plan", str(model), "--rates", shut, "--calibrate"], "--rates"),
        (["report", runs[0]], "report"),
        (["sweep", "--config", str(folder / "sweep.yaml")], "folder"),
        (["demo", "--folder", shut], "--folder"),
    ):  # fmt: skip
        message = fails(log, arguments)
        assert name in message, message
        assert str(folder) in message, message
    assert contents(folder) == before


def test_what_other_commands_write(tiny_model: TinyModel, tmp_path: Path, text: Path) -> None:
    (folder := tmp_path / "job").mkdir()
    in_a_process(others, tmp_path / "log", tiny_model(), folder, text)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path, why in (
        (tmp_path / "folder", "is a folder"),
        (tmp_path / ("x" * 256), "255"),
        (tmp_path / "folder" / "a" / ("x" * 256), "255"),
    ):
        with pytest.raises(OutputError, match=why):
            require_file(path, "--rates", "name another file")
    require_file(tmp_path / "a" / "b" / "rates", "--rates", "name another file")
    require_file(tmp_path / ("x" * 255), "--rates", "name another file")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# -- killed while it tries -------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from storage.files import trial
from storage.output.weight_files import name_aside
folder, left = Path(sys.argv[1]), [int(sys.argv[2])]
EVENTS = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove")

def hook(event, arguments):
    if event in EVENTS and str(folder) in str(arguments) and (left := count()) < 0:
        os.kill(os.getpid(), signal.SIGKILL)

def count():
    left[0] -= 1
    return left[0]

sys.addaudithook(hook)
trial.try_folder(folder / "run", "SCRATCH", ["a/b"])
trial.try_folder(folder, "PARTIAL", ["x"], final="out")
trial.require_folder(folder / "new", "x", "y", ["file"])
trial.try_replacing(folder / "out", name_aside(folder / "out"), lambda: None)
print("done")
"""


@pytest.mark.slow
def test_a_trial_that_is_killed_leaves_what_the_next_owner_sweeps(
    tiny_model: TinyModel, tmp_path: Path, text: Path, repository: Path
) -> None:
    """Killed before each call: what is left has the names of the sweep, or is an empty folder."""
    run_directory = RunDirectory(tmp_path / "out.run")
    partial = partial_prefix(tmp_path / "out", run_directory)
    script = tmp_path / "killed.py"
    script.write_text(KILLED.replace("SCRATCH", SCRATCH_PREFIX).replace("PARTIAL", partial))
    known = re.compile(
        rf"(run|new|out|run/{SCRATCH_PREFIX}[0-9a-f]{{12}}.*|{re.escape(partial)}[0-9a-f]{{12}}.*"
        r"|\.out\.prox24-replaced|new/\..*\.tmp)"
    )
    done, number, seen = False, 0, set()
    while not done:
        folder = tmp_path / f"killed-{number}"
        (folder / "out").mkdir(parents=True)
        finished = subprocess.run(
            [sys.executable, script, folder, str(number)],
            cwd=repository, env=os.environ | {"PYTHONPATH": str(repository)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        done = finished.stdout == "done\n"
        assert done or finished.returncode == -signal.SIGKILL, finished.stderr
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            assert known.fullmatch(name), name
            seen.add(name.partition("/")[0][:12])
        assert not done or [p.name for p in folder.iterdir()] == ["out"]
        number += 1
    assert number > 20
    assert {"run", "out", ".out.prox24-"} <= seen
    # The next owner: whatever was left is gone.
    (tmp_path / "out.run" / f"{SCRATCH_PREFIX}0123456789ab" / "x").mkdir(parents=True)
    (tmp_path / f"{partial}0123456789ab" / "out").mkdir(parents=True)
    assert run(prune(tiny_model(), tmp_path / "out", text)) == 0
    assert not list(tmp_path.glob(".out*"))
    assert not list((tmp_path / "out.run").glob(f"{SCRATCH_PREFIX}*"))


def test_an_output_that_was_just_moved_aside_comes_back(
    tiny_model: TinyModel, tmp_path: Path, text: Path
) -> None:
    """Killed between the two renames of an empty OUTPUT."""
    (tmp_path / ".out.prox24-replaced").mkdir()
    assert run(prune(tiny_model(), tmp_path / "out", text)) == 0
    assert not list(tmp_path.glob(".*"))


def test_a_folder_with_files_stays_where_it_is_while_it_is_tried(tmp_path: Path) -> None:
    (folder := tmp_path / "out").mkdir()
    (folder / "file").write_text("precious")
    before = folder.stat()
    try_replacing(folder, tmp_path / "aside", lambda: None)
    assert (folder.stat().st_ino, folder.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    (folder / "file").unlink()
    try_replacing(folder, tmp_path / "aside", lambda: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
