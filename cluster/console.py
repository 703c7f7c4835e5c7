"""What people see: a live bar on a terminal, lines elsewhere. All on stderr."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from cluster.terminal import bar, print_labelled, shows_bars, terminal
from pipeline.config.prune import PruneConfig
from pipeline.reconstruct.results import digits
from pipeline.runtime.progress import counted
from pipeline.runtime.units import duration, size
from storage.files.names import printable

if TYPE_CHECKING:
    from pipeline.prune import PruneResult

_SHOWN_KINDS = 3
_EVALUATING = "evaluating"
# Lines of an evaluation and of epochs, without a bar: no more than one in so many seconds.
_BETWEEN_LINES = 10.0
# Phases of no block that may take minutes, in words: where no bar names them, a line does.
_ALONE = {
    "read text": "reading the text",
    "check weights": "checking the weights",
    "make prompts": "making the prompts",
    "write": "writing the model",
}


class Console:
    """The `Progress` of the block loop, drawn for people."""

    # Whether, without a bar, each block has a line.
    _lines_of_blocks = True

    def __init__(self) -> None:
        self.console = terminal()
        self._bar: Progress | None = None
        self._task: Any = None
        self._title, self._blocks = "", 0
        self._started = self._block_started = self._told = time.monotonic()
        self._fresh, self._done, self._in_blocks = 0, 0, False

    def settings(self, model: str, output: str, config: PruneConfig) -> None:
        """What is about to be done."""
        solver = config.solver_settings(config.method)
        rows = [
            ("model", model),
            ("output", output),
            (
                "method",
                f"{config.method} {config.pattern}, damping {solver.damping:g}, "
                f"shrinkage {solver.shrinkage}, refine {solver.refine}",
            ),
            (
                "calibration",
                f"{config.nsamples} x {config.seqlen} tokens of {config.dataset}, "
                f"seed {config.seed}",
            ),
            *_reconstruction(config),
            ("executor", config.executor),
        ]
        print_labelled(self.console, rows)

    def print(self, message: str) -> None:
        """One line, unwrapped: a path or a command in it can be copied."""
        self.console.print(printable(message), soft_wrap=True, markup=False)

    def begin(self, title: str, blocks: int, done: int) -> None:
        """Starts the bar, or starts it over."""
        self._title, self._blocks = title, blocks
        self._started = self._block_started = self._told = time.monotonic()
        self._fresh, self._done, self._in_blocks = 0, done, False
        if done:
            self.print(f"{done} of {blocks} blocks are already done; going on from there")
        if self._bar is not None:
            self._bar.reset(self._task, total=blocks, completed=done, description=title, error="")
        elif shows_bars(self.console):
            self._bar = bar(self.console, "{task.completed:.0f}/{task.total:.0f}", self._left)
            self._task = self._bar.add_task(title, total=blocks, completed=done, error="")
            self._bar.start()

    def phase(self, name: str, block: int | None = None) -> None:
        """Names the phase in the bar; without one, those that may take long on a line."""
        if block is not None and not self._in_blocks:
            # Starting workers and checking weights is not a block's time.
            self._in_blocks = True
            self._started = self._block_started = time.monotonic()
        if self._bar is not None:
            where = name if block is None else f"block {block} {name}"
            if block is not None and counted(name) is not None:
                where = f"{block}: {name}"  # the room of a description is short
            self._bar.update(self._task, description=where)
        elif block is None and name in _ALONE:
            self.print(_ALONE[name])
        elif block is not None and counted(name) is not None:
            self._epoch(name, block)
        if self._title == _EVALUATING and self._in_blocks and name != "embed":
            # What follows the last block is of none.
            self._evaluating(self._blocks if block is None else block)

    def _epoch(self, name: str, block: int) -> None:
        """Now and then a line that says how far a long block is."""
        if self._lines_of_blocks and time.monotonic() - self._told >= _BETWEEN_LINES:
            self.print(f"block {block + 1}/{self._blocks}: {name}")
            self._told = time.monotonic()

    def _left(self) -> float | None:
        """Seconds left: by the mean of the blocks so far, less what has gone by of this one."""
        if not self._fresh:
            return None
        ended = self._block_started
        pace = (ended - self._started) / self._fresh
        gone = min(pace, time.monotonic() - ended)
        return max(0.0, (self._blocks - self._done) * pace - gone)

    def _evaluating(self, done: int) -> None:
        """An evaluation reports the start of each block: it has no event for the end."""
        now = time.monotonic()
        if self._bar is not None:
            if done > self._done:
                self._fresh, self._done, self._block_started = done, done, now
            self._bar.update(self._task, completed=done)
        elif done > self._fresh and now - self._told >= _BETWEEN_LINES:
            left = (self._blocks - done) * (now - self._started) / done
            self.print(f"{_EVALUATING}: block {done}/{self._blocks} done  eta {duration(left)}")
            self._told, self._fresh = now, done

    def block_done(
        self,
        block: int,
        relative_error: float | None,
        output_error: tuple[float, float] | None = None,
    ) -> None:
        """Moves the bar, or prints the block's line."""
        error = "" if relative_error is None else f"error {relative_error:.3f}%"
        now = time.monotonic()
        took, self._block_started, self._told = now - self._block_started, now, now
        self._fresh, self._done = self._fresh + 1, block + 1
        if self._bar is not None:
            if output_error is not None:
                error = f"output {'->'.join(map(digits, output_error))}%"
            self._bar.update(self._task, completed=block + 1, error=error)
            return
        if output_error is not None:
            error += f"  output error {' -> '.join(map(digits, output_error))}%"
        left = self._left() or 0.0
        self.print(
            f"block {block + 1}/{self._blocks} done in {took:.1f} s  {error}  eta {duration(left)}"
        )

    def attempt_failed(self, what: str, attempt: int, attempts: int, reason: str) -> None:
        """One line above the bar."""
        self.print(f"{what}: {reason}; trying again (attempt {attempt} of {attempts} failed)")

    def note(self, message: str) -> None:
        """One line above the bar."""
        self.print(message)

    def inform(self, message: str) -> None:
        """One line above the bar."""
        self.print(message)

    def end(self) -> None:
        """Takes the bar down; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def result(self, result: PruneResult) -> None:
        """What a finished job left."""
        summary = result.summary
        self.print(f"wrote {result.output}")
        if not summary:
            return
        kinds = sorted(summary["seconds"].items(), key=lambda item: -item[1])
        parts = ", ".join(f"{kind} {seconds:.1f} s" for kind, seconds in kinds if seconds >= 0.05)
        peaks = {
            who: f"{who} {summary['memory'][f'{who}_rss_bytes'] / 2**20:.0f} MiB"
            for who in ("driver", "worker")
        }
        time_taken = f"{summary['wall']:.1f} s of committed work"
        rows = [
            ("time", f"{time_taken}; {parts}" if parts else time_taken),
            ("peak memory", ", ".join(peaks.values())),
            *who_did_what(summary),
        ]
        print_labelled(self.console, rows)
        page = result.run_directory / "report" / "report.html"
        if page.exists():
            self.print(f"report: {page}")


def _reconstruction(config: PruneConfig) -> list[tuple[str, str]]:
    """How blocks are reconstructed; nothing where they are not."""
    how = config.reconstruction(config.nsamples)
    if how is None:
        return []
    steps = f"{how.batch} sequence{'s' if how.batch > 1 else ''}"
    what = (
        f"of blocks, up to {how.epochs} epochs in steps of {steps}, learning rate "
        f"{how.learning_rate:g}, target "
        f"{config.reconstruct_target}, mask {config.reconstruct_mask}"
        f"{', norms too' if how.norms else ''}"
    )
    return [("reconstruct", what)]


def who_did_what(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """A label and what it says: of each worker process of a job, and each failure on the way."""
    lines = []
    for worker in summary["workers"]:
        seconds = sorted(worker["seconds"].items(), key=lambda item: -item[1])
        parts = ", ".join(f"{kind} {value:.1f} s" for kind, value in seconds[:_SHOWN_KINDS])
        counts = worker["counts"]
        sent, wrote = (
            sum(n for name, n in counts.items() if name.endswith(f"_{what}_bytes"))
            for what in ("sent", "written")
        )
        what = (
            f"on {worker['host']} (process {worker['pid']}): {ranges(worker['blocks'])}; {parts}; "
            f"sent {size(sent)}, wrote {size(wrote)}, "
            f"peak {worker['peak_bytes'] / 2**20:.0f} MiB"
        )
        lines.append((f"worker {worker['rank']}", what))
    for block in summary["blocks"]:
        lines += [("retried", f"block {block['block']}: {why}") for why in block["failures"]]
    return lines


def ranges(blocks: list[int]) -> str:
    """`block 3`, or `blocks 0-3, 7`."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1][1:] = [block]
        else:
            runs.append([block])
    text = ", ".join("-".join(map(str, run)) for run in runs)
    return f"block{'s' if len(blocks) > 1 else ''} {text}"
