"""Progress that Prometheus sees too."""

from __future__ import annotations

import ray

from actors.metrics import Meter
from pipeline.runtime.progress import Progress, counted


class MeteredProgress:
    """Passes every event on to `inner`, and records it as metrics while Ray is connected."""

    def __init__(self, inner: Progress, run: str) -> None:
        """`run`: the name of the run directory, the label of all metrics."""
        self._inner, self._meter = inner, Meter(run)
        self._phase: str | None = None

    def begin(self, title: str, blocks: int, done: int) -> None:
        """Records how many blocks there are, and how many are done."""
        self._inner.begin(title, blocks, done)
        self._set("prox24_blocks", blocks)
        self._set("prox24_blocks_done", done)

    def phase(self, name: str, block: int | None = None) -> None:
        """Records the phase, the block it is of, and the number of an epoch."""
        self._inner.phase(name, block)
        if (parts := counted(name)) is not None:
            # One phase, and its number beside it: not a label for each.
            name, epoch, _ = parts
            self._set("prox24_epoch", epoch)
        if self._phase not in (None, name):
            self._set("prox24_phase", 0, phase=str(self._phase))
        self._phase = name
        self._set("prox24_phase", 1, phase=name)
        if block is not None:
            self._set("prox24_block", block)

    def block_done(
        self,
        block: int,
        relative_error: float | None,
        output_error: tuple[float, float] | None = None,
    ) -> None:
        """Records the block and its error."""
        self._inner.block_done(block, relative_error, output_error)
        self._set("prox24_blocks_done", block + 1)
        if relative_error is not None:
            self._set("prox24_relative_error_ratio", relative_error / 100, block=str(block))
        for when, error in zip(("before", "after"), output_error or (), strict=False):
            ratio = error / 100
            self._set("prox24_output_error_ratio", ratio, block=str(block), reconstruction=when)

    def attempt_failed(self, what: str, attempt: int, attempts: int, reason: str) -> None:
        """Counts the failure."""
        self._inner.attempt_failed(what, attempt, attempts, reason)
        if ray.is_initialized():
            self._meter.add("prox24_retries", 1)

    def note(self, message: str) -> None:
        """Only passed on."""
        self._inner.note(message)

    def inform(self, message: str) -> None:
        """Only passed on."""
        self._inner.inform(message)

    def end(self) -> None:
        """Only passed on."""
        self._inner.end()

    def _set(self, name: str, value: float, **labels: str) -> None:
        if ray.is_initialized():
            self._meter.set(name, value, **labels)
