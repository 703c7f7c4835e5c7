"""Commands, and all files that they touch, at several moments of a job: stages for file faults.

A scene plays in one folder, always at the same path, which is put back to what it was before each
case. What the folder holds is listed from the disk: a new kind of file takes part by itself.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.file_faults import (
    FAULTS,
    MISSING,
    Fault,
    Put,
    as_a_plain_user,
    complaint,
    remove,
    starred,
)
from tests.support.injection import Injection
from tests.support.jobs import contents, write_text
from tests.support.processes import Driver
from tests.support.tiny_models import save_tiny_model

LOCAL = "pipeline.worker.local_executor:LocalExecutor"
RAY = "cluster.dispatch.ray_executor:RayExecutor"


def as_a_user_of(temporary: Path, strike: Strike | None) -> None:
    """Modes hold, temporary files go to a folder of the scene, and a strike is armed."""
    tempfile.tempdir = str(temporary)
    os.environ["TMPDIR"] = str(temporary)
    as_a_plain_user()
    if strike is not None:
        strike.arm()


@dataclass(frozen=True)
class Strike:
    """What happens in a command's process just before its executor begins a phase, once.

    executor: the class whose `run` begins it, as MODULE:CLASS.
    """

    phase: str
    block: int | None
    what: Callable[[], object]
    executor: str

    def arm(self) -> None:
        """For the process that is to be struck."""
        module, _, name = self.executor.partition(":")
        kind: Any = getattr(importlib.import_module(module), name)
        run, struck = kind.run, []

        @functools.wraps(run)
        def wrapped(executor: Any, calls: Sequence[Any]) -> Any:
            if not struck and (calls[0].phase, calls[0].block) == (self.phase, self.block):
                struck.append(self.what())
            return run(executor, calls)

        kind.run = wrapped


@dataclass(frozen=True)
class Outcome:
    """What a command ended with.

    files: path -> bytes, in `out`. names: of everything that lies in the scene's folder, with stars
    for what is chosen at random.
    """

    status: int
    stdout: str
    errors: str
    files: dict[str, bytes]
    names: frozenset[str]

    def without(self, path: str) -> Outcome:
        """The same without what lies at or below a path, or where a link in its place leads."""
        places = (path, starred(path), str(Path(path).with_name(MISSING)))

        def kept(name: str) -> bool:
            return not any(name == place or name.startswith(f"{place}/") for place in places)

        files = {name: raw for name, raw in self.files.items() if kept(name)}
        return replace(self, files=files, names=frozenset(filter(kept, self.names)))


@dataclass(frozen=True)
class Case:
    """A fault on a path, which is relative to the scene's folder."""

    path: str
    fault: Fault

    def __str__(self) -> str:
        return f"{self.path} {self.fault.name}"


@dataclass
class Scene:
    """One command in one folder.

    fill: puts the files of the user there. arguments: of the command, `{}` for the folder. before:
    a command that is run first, if any. at: the point (see `tests.support.injection`) at which the
    command has been killed once; None: it was never run. prints: whether what it prints is always
    the same.
    """

    folder: Path
    fill: Callable[[Path], None]
    arguments: Sequence[str]
    before: Sequence[Sequence[str]] = ()
    at: str | None = None
    prints: bool = True
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.work, self.template = self.folder / "work", self.folder / "template"
        self.work.mkdir()
        self.fill(self.work)
        for command in self.before:
            ended = self.run(command)
            assert ended.status == 0, ended.errors
        shutil.copytree(self.work, self.template, symlinks=True)
        self.expected = self.run()
        assert self.expected.status == 0, self.expected.errors
        if self.at is not None:
            self.reset()
            ended = self.run(injection=Injection(self.work, self.at, signal.SIGKILL))
            assert ended.status == -signal.SIGKILL, ended.errors
            shutil.rmtree(self.template)
            shutil.copytree(self.work, self.template, symlinks=True)

    def reset(self) -> None:
        """Puts the folder back to what it was."""
        for folder, names, _ in os.walk(self.work):
            for name in names:
                if not os.path.islink(os.path.join(folder, name)):
                    os.chmod(os.path.join(folder, name), 0o755)
        shutil.rmtree(self.work)
        shutil.copytree(self.template, self.work, symlinks=True)

    def run(
        self,
        arguments: Sequence[str] | None = None,
        injection: Injection | None = None,
        strike: Strike | None = None,
    ) -> Outcome:
        """The command, or another, to its end."""
        words = [word.format(self.work) for word in arguments or self.arguments]
        log = self.folder / f"log-{next(self.numbers)}"
        temporary = self.work / "tmp"
        driver = Driver(
            words, log, {"HOME": str(self.folder)}, injection=injection,
            lock_options={"stale_seconds": 1.0}, first=partial(as_a_user_of, temporary, strike),
        )  # fmt: skip
        status = driver.wait()
        ended = Outcome(status, driver.output(), driver.errors(), {}, frozenset())
        if status != 0:
            return ended
        found = {f"out/{name}": raw for name, raw in contents(self.work / "out").items()}
        paths = (path.relative_to(self.work) for path in self.work.rglob("*"))
        names = {starred(str(path)) for path in paths if not path.is_relative_to("tmp/ray")}
        return replace(ended, files=found, names=frozenset(names))

    def cases(self, faults: Sequence[str] = tuple(FAULTS)) -> list[Case]:
        """Every file and folder of the scene, with every fault that it can have."""
        return _cases(self.template, faults)

    def problem(self, case: Case, *, again: bool = True) -> str | None:
        """Plays a case; what is wrong with how the command takes it, or None.

        again: run the same command once more without the fault, if it has stopped the first one.
        """
        self.reset()
        remove(self.folder / "aside")
        put = Put.on(self.work / case.path, case.fault, self.folder / "aside")
        ended = self.run()
        put.take_off()
        return self.judged(ended, case, again=again)

    def judged(self, ended: Outcome, case: Case, *, again: bool = True) -> str | None:
        """What is wrong with how a command ended that met a fault, which is gone again."""
        self.said = ended.errors
        if ended.status == 0:
            return self._difference(ended, case)
        if ended.status != 2:
            return f"status {ended.status}: {ended.errors}"
        if ended.stdout:
            return f"it printed {ended.stdout}"
        if wrong := complaint(ended.errors, self.work / case.path):
            return f"{wrong}: {ended.errors}"
        if not again:
            return None
        after = self.run()
        if after.status != 0:
            return f"afterwards status {after.status}: {after.errors}; before {ended.errors}"
        return self._difference(after)

    def _difference(self, ended: Outcome, case: Case | None = None) -> str | None:
        """How what a command left differs from an undisturbed job's; `case`: the fault is there."""
        expected = self.expected
        if case is not None:
            ended, expected = ended.without(case.path), expected.without(case.path)
        files = ended.files.keys() | expected.files.keys()
        changed = sorted(n for n in files if ended.files.get(n) != expected.files.get(n))
        if changed:
            return f"other files: {changed}; {ended.errors}"
        if ended.stdout != expected.stdout and self.prints:
            return f"it printed {ended.stdout}"
        more = sorted(ended.names - expected.names)
        return f"files are left: {more}; {ended.errors}" if more else None


@dataclass
class RunningScene(Scene):
    """A scene whose faults come while the command runs: just before a phase (of a block).

    executor: as of `Strike`.
    """

    phase: str = ""
    block: int | None = None
    executor: str = LOCAL

    def __post_init__(self) -> None:
        super().__post_init__()
        self.begun = self.folder / "begun"
        self.reset()
        copy = partial(_copy, self.work, self.begun)
        ended = self.run(strike=Strike(self.phase, self.block, copy, self.executor))
        assert ended.status == 0, ended.errors

    def cases(self, faults: Sequence[str] = tuple(FAULTS)) -> list[Case]:
        """Every file and folder that is there when the phase begins."""
        return _cases(self.begun, faults)

    def problem(self, case: Case, *, again: bool = True) -> str | None:
        """As of `Scene`, but the fault is put on in the middle."""
        self.reset()
        remove(self.folder / "aside")
        note = self.folder / "put"
        put = partial(_put_on, self.work, case, self.folder / "aside", note)
        ended = self.run(strike=Strike(self.phase, self.block, put, self.executor))
        path, mode, inode = json.loads(note.read_text())
        Put(Path(path), case.fault, self.folder / "aside", mode, inode).take_off()
        return self.judged(ended, case, again=again)


def _copy(work: Path, to: Path) -> None:
    """Without the sockets of a Ray of the job's own."""
    shutil.copytree(work, to, symlinks=True, ignore=shutil.ignore_patterns("ray"))


def _put_on(work: Path, case: Case, aside: Path, note: Path) -> None:
    """Puts a fault on the file of that name, but for what is random in it."""
    paths = sorted(work.rglob("*"))
    named = (p for p in paths if starred(p.relative_to(work).as_posix()) == starred(case.path))
    put = Put.on(next(named), case.fault, aside)
    note.write_text(json.dumps([str(put.path), put.mode, put.inode]))


def _cases(folder: Path, faults: Sequence[str]) -> list[Case]:
    paths = sorted(path for path in folder.rglob("*") if not path.is_symlink())
    return [
        Case(path.relative_to(folder).as_posix(), FAULTS[name])
        for path in paths
        for name in faults
        if FAULTS[name].fits(path)
    ]


# -- what users have -------------------------------------------------------------------------------

OPTIONS = """\
nsamples: 4
seqlen: 16
batch_size: 2
threads: 1
workers: 2
executor: local
"""


def fill(work: Path) -> None:
    """A model of two weight files, a text, a job's options, and the folders for what is written."""
    for name in ("in", "out", "state", "extra", "tmp"):
        (work / name).mkdir()
    model = save_tiny_model(work / "in/model", blocks=2, hidden=16, intermediate=32, weight_files=2)
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    write_text(work / "in/text.txt", 2048)
    (work / "in/job.yaml").write_text(f"{OPTIONS}shrinkage: auto\n")
    (work / "in/eval.yaml").write_text(OPTIONS)


PRUNE = (
    "prune", "{}/in/model", "{}/out/pruned", "--dataset={}/in/text.txt", "--config={}/in/job.yaml",
    "--run-dir={}/state/run",
)  # fmt: skip
PLAIN = (*PRUNE, "--no-report")
RICH = (
    *PRUNE, "--trace={}/extra/trace.json", "--save-layers=*.0.*q_proj",
    "--eval-dataset={}/in/text.txt",
)  # fmt: skip
SCRATCH = (*PLAIN, "--scratch-dir={}/extra")
TRAINED = (*PLAIN, "--reconstruct=block", "--reconstruct-epochs=2")


def _killed(at: str | None, arguments: Sequence[str] = PLAIN) -> Callable[[Path], Scene]:
    return lambda folder: Scene(folder, fill, arguments, at=at)


def _after(*arguments: str, prints: bool = True) -> Callable[[Path], Scene]:
    return lambda folder: Scene(folder, fill, arguments, before=(RICH,), prints=prints)


def _running(
    phase: str, block: int | None, arguments: Sequence[str] = PLAIN
) -> Callable[[Path], Scene]:
    return lambda folder: RunningScene(folder, fill, arguments, phase=phase, block=block)


def _alone(*arguments: str, prints: bool = True) -> Callable[[Path], Scene]:
    return lambda folder: Scene(folder, fill, arguments, prints=prints)


SCENES: dict[str, Callable[[Path], Scene]] = {
    "a new job": _killed(None),
    "the first inputs": _killed("after link state/run/activations/block-000/record"),
    "a block": _killed("after link state/run/checkpoints/block-000/record"),
    "the next inputs": _killed("after link state/run/activations/block-001/record"),
    "the output": _killed("before rename out/pruned"),
    "cleaning up": _killed("after rename out/pruned"),
    "while block 0 is solved": _running("solve", 0),
    "while block 1 is solved": _running("solve", 1),
    "while the model is written": _running("write_output", None),
    "a rich job": _killed("before link state/run/checkpoints/block-001/record", RICH),
    "on scratch": _killed("after link state/run/activations/block-001/record", SCRATCH),
    "a solved block": _killed("after link state/run/checkpoints/block-001/solved", TRAINED),
    "a reconstructed block": _killed("after link state/run/checkpoints/block-001/record", TRAINED),
    "while block 1 is trained": _running("train", 1, TRAINED),
    "status": _after("status", "{}/state/run", prints=False),
    "report": _after("report", "{}/state/run"),
    "compare": _after("compare", "{}/state/run", "--output={}/extra/tables"),
    "verify": _after("verify", "{}/out/pruned", "--source={}/in/model", prints=False),
    "solve": _after(
        "solve", "{}/state/run/layers/model.layers.0.self_attn.q_proj.safetensors",
        "--output={}/extra/solved", "--threads=1", prints=False,
    ),
    "eval": _alone(
        "eval", "{}/in/model", "--dataset={}/in/text.txt", "--config={}/in/eval.yaml",
        "--scratch-dir={}/extra", "--trace={}/extra/trace.json", "--json",
    ),
    "eval in TMPDIR": _alone(
        "eval", "{}/in/model", "--dataset={}/in/text.txt", "--config={}/in/eval.yaml", "--json",
    ),
    "plan": _alone("plan", "{}/in/model", prints=False),
    "plan of a config": _alone("plan", "{}/in/model/config.json", prints=False),
}  # fmt: skip
"""Name -> makes the scene in an empty folder."""
