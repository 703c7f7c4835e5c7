"""Damage to files, and a tiny job whose run directory holds every kind of file there is."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.config.prune import PruneConfig
from pipeline.loop.executor import Executor
from pipeline.loop.rank import Call
from pipeline.messages import Job, Outcome
from pipeline.prune import PruneResult, prune
from pipeline.records.tokens import CutTokens, cut_tokens
from pipeline.runtime.progress import Silent
from pipeline.worker.local_executor import LocalExecutor
from tests.support.jobs import contents, write_text
from tests.support.processes import CONTEXT
from tests.support.tiny_models import save_tiny_model

BLOCKS = 3
OPTIONS: dict[str, Any] = {
    "nsamples": 12,  # three activation shards
    "seqlen": 16,
    "batch_size": 2,
    "threads": 1,
    "workers": 2,
    "shrinkage": "auto",  # there is something to choose
    "save_layers": "*layers.0.self_attn.q_proj",
    "reconstruct": "none",  # tests/reconstruct damages what it makes
}

# Every kind of file of a run directory: a name for it, and its path.
KINDS = {
    "manifest": r"run\.json",
    "status": r"status\.json",
    "lock": r"lock-[0-9a-f]+\.json",
    "tokens": r"tokens\.arrow",
    "choices": rf"choices/block-00[0-{BLOCKS - 2}]\.json",
    "choices, not used yet": rf"choices/block-00{BLOCKS - 1}\.json",
    "block record": r"checkpoints/block-\d{3}/record\.json",
    "row slices": r"checkpoints/block-\d{3}/rank-\d+\.[0-9a-f]+-\d+\.safetensors",
    "shards record": r"activations/block-\d{3}/record\.json",
    "activation shard": r"activations/block-\d{3}/shard-\d{5}\.[0-9a-f]+-\d+\.arrow",
    "times": r"report/inputs-\d{3}\.json",
    "saved layer": r"layers/.+\.safetensors",
}

# Those of a job with --reconstruct, beside the others. Its row slices are solved ones.
TRAINED_KINDS = {
    "targets record": r"targets/block-\d{3}/record\.json",
    "target shard": r"targets/block-\d{3}/shard-\d{5}\.[0-9a-f]+-\d+\.arrow",
    "solved record": r"checkpoints/block-\d{3}/solved\.json",
    "trained slices": r"checkpoints/block-\d{3}/trained-\d+\.[0-9a-f]+-\d+\.safetensors",
}


def flip(path: Path) -> None:
    """One bit of the middle byte."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def delete(path: Path) -> None:
    path.unlink()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "truncated": truncate,
    "emptied": empty,
    "deleted": delete,
}


def kind_of(name: str) -> str | None:
    """The kind of a file by its path in the run directory; None for one that is not known."""
    kinds = KINDS | TRAINED_KINDS
    return next((kind for kind, path in kinds.items() if re.fullmatch(path, name)), None)


def of_kind(run: Path, kind: str) -> list[Path]:
    """The run directory's files of a kind, sorted."""
    names = (path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())
    return [run / name for name in sorted(names) if kind_of(name) == kind]


class Notes(Silent):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.choices: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def inform(self, message: str) -> None:
        self.choices.append(message)

    def name(self, path: Path) -> bool:
        """Whether a note names a file."""
        return any(str(path) in note for note in self.notes)


class Interrupting(LocalExecutor):
    """The local executor, with something done before certain phases."""

    def __init__(self, world: int, before: Callable[[str, int | None], None]) -> None:
        super().__init__(world, 1)
        self.before = before

    def start(self, job: Job) -> None:
        super().start(job)
        self.folder = Path(job.run_directory)

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        self.before(calls[0].phase, calls[0].block)
        return super().run(calls)


@dataclass(frozen=True)
class Tiny:
    """A job, and what it ends with when nothing disturbs it.

    options: beside, or in place of, OPTIONS.
    """

    model: Path
    text: Path
    expected: dict[str, bytes]
    cut: CutTokens = cut_tokens
    options: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def make(folder: Path, hidden: int = 16, cut: CutTokens = cut_tokens, **options: Any) -> Tiny:
        model = save_tiny_model(
            folder / "model", blocks=BLOCKS, hidden=hidden, intermediate=2 * hidden, weight_files=2
        )
        text = write_text(folder / "text.txt", 2048)
        tiny = Tiny(model, text, {}, cut, options)
        tiny.prune(folder)
        return replace(tiny, expected=contents(folder / "output"))

    def prune(
        self,
        folder: Path,
        progress: Silent | None = None,
        executor: Executor | None = None,
        **options: Any,
    ) -> PruneResult:
        """The job in `folder`, in this process."""
        fixed = {"dataset": str(self.text), "executor": "local", "no_report": True}
        options = OPTIONS | fixed | self.options | options
        model = options.pop("model", self.model)
        config = PruneConfig(run_dir=str(folder / "run"), **options)
        return prune(
            model,
            folder / "output",
            config,
            lambda: executor or LocalExecutor(config.workers or 1, 1),
            progress or Silent(),
            cut=self.cut,
        )

    def check(self, folder: Path) -> None:
        """The output is that of the undisturbed job, byte for byte."""
        found = contents(folder / "output")
        assert found.keys() == self.expected.keys()
        assert [name for name in found if found[name] != self.expected[name]] == []

    def killed(self, folder: Path, phase: str, block: int) -> Path:
        """The run directory of the job, killed by SIGKILL just before a phase of a block."""
        folder.mkdir()
        process = CONTEXT.Process(target=_die, args=(self, folder, phase, block))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        return folder / "run"


def _die(tiny: Tiny, folder: Path, phase: str, block: int) -> None:
    def before(name: str, number: int | None) -> None:
        if (name, number) == (phase, block):
            os.kill(os.getpid(), signal.SIGKILL)

    tiny.prune(folder, executor=Interrupting(2, before))


def copied(run: Path, folder: Path, *, lock: bool = False) -> Path:
    """A copy of a run directory as `folder`/run; its dead owner's lock only if asked for."""
    ignore = None if lock else shutil.ignore_patterns("lock-*")
    return Path(shutil.copytree(run, folder / "run", ignore=ignore))
