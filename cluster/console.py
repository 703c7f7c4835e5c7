"""What people see: a live bar on a terminal, one line per block elsewhere. All on stderr."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.config import PruneConfig
from pipeline.units import duration, size

if TYPE_CHECKING:
    from pipeline.prune import PruneResult

SENT = "statistics_sent_bytes"
_SHOWN_KINDS = 3


class Console:
    """The `Progress` of the block loop, drawn for people."""

    def __init__(self) -> None:
        self.console = rich.console.Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._title, self._blocks = "", 0
        self._started = self._block_started = time.monotonic()
        self._fresh, self._in_blocks = 0, False

    def settings(self, model: str, output: str, config: PruneConfig) -> None:
        """What is about to be done, in two lines."""
        solver = config.solver_settings(config.method)
        self.print(
            f"{model} -> {output}: {config.method} {config.pattern}, damping "
            f"{solver.damping:g}, shrinkage {solver.shrinkage}, refine {solver.refine}"
        )
        self.print(
            f"calibration: {config.nsamples} x {config.seqlen} tokens of {config.dataset}, "
            f"seed {config.seed}; executor {config.executor}"
        )

    def print(self, message: str) -> None:
        """One line, unwrapped."""
        self.console.print(message, soft_wrap=True, markup=False)

    def begin(self, title: str, blocks: int, done: int) -> None:
        """Starts the bar."""
        self._title, self._blocks = title, blocks
        self._started = self._block_started = time.monotonic()
        self._fresh, self._in_blocks = 0, False
        if done:
            self.print(f"{done} of {blocks} blocks are already done; going on from there")
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[error]}"),
                console=self.console,
            )
            self._task = self._bar.add_task(title, total=blocks, completed=done, error="")
            self._bar.start()

    def phase(self, name: str, block: int | None = None) -> None:
        """Names the phase in the bar."""
        if block is not None and not self._in_blocks:
            # Starting workers and checking weights is not a block's time.
            self._in_blocks = True
            self._started = self._block_started = time.monotonic()
        if self._bar is not None:
            where = name if block is None else f"block {block} {name}"
            self._bar.update(self._task, description=f"{where:<20}")
        if name == "propagate" and self._title == "evaluating" and block is not None:
            self._advance(block + 1, "")

    def block_done(self, block: int, relative_error: float | None) -> None:
        """Moves the bar, or prints the block's line."""
        error = "" if relative_error is None else f"error {relative_error:.3f}%"
        self._fresh += 1
        self._advance(block + 1, error)
        if self._bar is None:
            now = time.monotonic()
            left = (self._blocks - block - 1) * (now - self._started) / self._fresh
            self.print(
                f"block {block + 1}/{self._blocks} done in {now - self._block_started:.1f} s  "
                f"{error}  eta {duration(left)}"
            )
            self._block_started = now

    def _advance(self, completed: int, error: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, error=error)

    def attempt_failed(self, what: str, attempt: int, attempts: int, reason: str) -> None:
        """One line above the bar."""
        self.print(f"{what}: {reason}; trying again (attempt {attempt} of {attempts} failed)")

    def note(self, message: str) -> None:
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
        parts = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in summary["seconds"].items())
        memory = summary["memory"]
        self.print(f"seconds: {summary['wall']:.1f} in all; {parts}")
        self.print(
            f"peak memory: driver {memory['driver_rss_bytes'] / 2**20:.0f} MiB, "
            f"worker {memory['worker_rss_bytes'] / 2**20:.0f} MiB"
        )
        for line in who_did_what(summary):
            self.print(line)
        page = result.run_directory / "report" / "report.html"
        if page.exists():
            self.print(f"report: {page}")


def who_did_what(summary: dict[str, Any]) -> list[str]:
    """One line per worker process of a job, and one per failure on the way."""
    lines = []
    for worker in summary["workers"]:
        seconds = sorted(worker["seconds"].items(), key=lambda item: -item[1])
        parts = ", ".join(f"{kind} {value:.1f} s" for kind, value in seconds[:_SHOWN_KINDS])
        counts = worker["counts"]
        wrote = sum(n for name, n in counts.items() if name.endswith("_written_bytes"))
        lines.append(
            f"worker {worker['rank']} on {worker['host']} (process {worker['pid']}): "
            f"{ranges(worker['blocks'])}; {parts}; sent {size(counts.get(SENT, 0))}, "
            f"wrote {size(wrote)}, peak {worker['peak_bytes'] / 2**20:.0f} MiB"
        )
    for block in summary["blocks"]:
        lines += [f"block {block['block']} was retried: {why}" for why in block["failures"]]
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


def solve_table(results: dict[str, dict[str, Any]]) -> str:
    """`prox24 solve`'s results, one line per method."""
    lines = [f"{'method':<12}{'relative error':>15}{'seconds':>10}{'iterations':>12}{'MiB':>8}"]
    for method, figures in results.items():
        lines.append(
            f"{method:<12}{figures['relative_error']:>14.4f}%{figures['seconds']:>10.2f}"
            f"{figures['report']['iterations']:>12}{figures['peak_memory_bytes'] / 2**20:>8.0f}"
        )
        lines += [f"  {text}" for text in figures["report"]["deviations"]]
    return "\n".join(lines)


def comparison_table(results: list[dict[str, Any]]) -> str:
    """`prox24 eval`'s results for several models, a line each and at most 80 columns."""
    first = results[0]
    width = 80 - 11 - 19 - 9 - 9 - 9
    lines = [
        f"{first['dataset']}, {first['nsamples']} x {first['seqlen']} tokens; differences from "
        f"{first['model']}",
        f"{'model':<{width}}{'perplexity':>11}{'loss':>19}{'JS':>9}{'KL':>9}{'top-1':>9}",
    ]
    for result in results:
        # The end of a path says more than its beginning.
        name = str(result["model"])
        name = name if len(name) < width else f"..{name[len(name) - width + 3 :]}"
        line = f"{name:<{width}}{result['perplexity']:>11.4f}"
        if against := result.get("against_first"):
            loss = f"{against['loss_difference']:+.4f} ± {against['standard_error']:.4f}"
            line += (
                f"{loss:>19}{against['jensen_shannon']:>9.4f}{against['kullback_leibler']:>9.4f}"
                f"{100 * against['same_token']:>7.2f} %"
            )
        lines.append(line)
    lines.append("loss, JS and KL in nats a token; loss with its paired standard error")
    lines.append(provenance(first))
    return "\n".join(lines)


def provenance(result: dict[str, Any]) -> str:
    """What a perplexity is of, on one line: the text's commit or hash, and the tokenizer."""
    tokenizer = result["tokenizer"]
    kind, _, value = result["dataset_revision"].rpartition(":")
    return (
        f"dataset {kind or 'revision'} {value[:12]}, tokenizer {tokenizer['class']} of "
        f"{tokenizer['tokens']} tokens"
    )
