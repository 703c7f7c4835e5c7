"""Background threads that read ahead and write behind while the device computes.

Hashing, copying and disk calls release Python's global lock, so they overlap with computation.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


FILE_THREADS = 8
"""Threads of a GPU worker for its files; a node should have as many cores for each GPU."""


def file_threads(device: str, threads: int) -> int:
    """How many files a worker reads, hashes or writes at a time.

    device: torch's type. threads: of `--threads`, which compute; those of a GPU worker do not, so
    it has FILE_THREADS, or as many as this machine has cores.
    """
    return min(FILE_THREADS, len(os.sched_getaffinity(0))) if device == "cuda" else threads


class Background:
    """Runs functions in `threads` threads, which are started when first needed."""

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, function: Callable[[], R]) -> Future[R]:
        """Runs `function`; it begins after all functions that were submitted before."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="prox24-background")
        return self._pool.submit(function)

    def ahead(self, function: Callable[[T], R], items: Iterable[T], depth: int = 1) -> Iterator[R]:
        """`map(function, items)`; the next `depth` results are computed while one is used."""
        coming: deque[Future[R]] = deque()
        try:
            for item in items:
                coming.append(self.submit(lambda item=item: function(item)))  # type: ignore[misc]
                if len(coming) > depth:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for left in coming:
                left.cancel()


class Behind:
    """Writes in the background, at most `most` at a time."""

    def __init__(self, background: Background, most: int = 1) -> None:
        self._background, self._most = background, most
        self._writing: deque[Future[None]] = deque()

    def add(self, function: Callable[[], None]) -> None:
        """Starts this write, once fewer than `most` go on; raises the errors of older ones."""
        while len(self._writing) >= self._most:
            self._writing.popleft().result()
        self._writing.append(self._background.submit(function))

    def wait(self) -> None:
        """Waits for all writes; raises the error of the first that failed."""
        while self._writing:
            self._writing.popleft().result()
