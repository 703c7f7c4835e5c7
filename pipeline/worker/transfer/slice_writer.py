"""Writes a rank's row slices to files that are hashed and written in the background.

A rank that has many bytes writes several files, so that they are hashed by several threads when
they are written and when they are read. How slices are divided depends on their sizes alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType

from torch import Tensor

from pipeline.messages import SliceFile
from pipeline.runtime.background import Background
from storage.files.hashing import StoredFile
from storage.run.checkpoints import RowSlice, write_row_slices

FILE_BYTES = 128 * 2**20
"""The most bytes of row slices in one file, unless a single row has more."""


class SliceWriter:
    """The files of one rank's row slices in one pass over a block.

    A context: if it is left by an error, no thread writes any more, and no file is left.
    """

    def __init__(
        self, folder: Path, rank: int, stamp: str, background: Background, guard: Callable[[], None]
    ) -> None:
        """guard: runs before a file is begun, and may raise to prevent it."""
        self._folder, self._rank, self._stamp = folder, rank, stamp
        self._background, self._guard = background, guard
        self._pending: dict[str, RowSlice] = {}
        self._bytes = 0
        self._begun: list[tuple[Path, dict[str, tuple[int, int]], Future[StoredFile]]] = []

    def __enter__(self) -> SliceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is None:
            return
        for path, _, writing in self._begun:
            if writing.exception() is None:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)

    def add(self, layer: str, start: int, rows: Tensor) -> None:
        """Takes rows start : start + len(rows) of a layer, (rows, C) on the CPU.

        Files that are full are written in the background; the caller may not change `rows`.
        """
        each, at = rows.shape[1] * rows.element_size(), 0
        while at < len(rows):
            room = (FILE_BYTES - self._bytes) // each
            if room < 1 and self._pending:
                self._begin()
                continue
            part = rows[at : at + max(room, 1)]
            self._pending[layer] = RowSlice(start + at, part)
            self._bytes += part.nbytes
            at += len(part)

    def finish(self) -> tuple[SliceFile, ...]:
        """All files, complete and durable. Raises the first error of a write."""
        if self._pending:
            self._begin()
        return tuple(SliceFile(writing.result(), ranges) for _, ranges, writing in self._begun)

    def _begin(self) -> None:
        """Starts to write what is pending."""
        slices, self._pending, self._bytes = self._pending, {}, 0
        number = len(self._begun)
        name = f"rank-{self._rank}{f'-part-{number}' if number else ''}.{self._stamp}.safetensors"
        path = self._folder / name
        self._guard()
        ranges = {
            layer: (part.start, part.start + len(part.tensor)) for layer, part in slices.items()
        }
        writing = self._background.submit(partial(write_row_slices, path, slices))
        self._begun.append((path, ranges, writing))
