"""A background thread that reads ahead and writes behind while the device computes.

Hashing, copying and disk calls release Python's global lock, so they overlap with computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Background:
    """Runs functions one after another in a thread, which is started when first needed."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, function: Callable[[], R]) -> Future[R]:
        """Runs `function` after all functions that were submitted before."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="prox24-background")
        return self._pool.submit(function)

    def ahead(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`map(function, items)`; the next result is computed while the caller uses this one."""
        coming: Future[R] | None = None
        try:
            for item in items:
                ready, coming = coming, self.submit(lambda item=item: function(item))  # type: ignore[misc]
                if ready is not None:
                    yield ready.result()
            if coming is not None:
                ready, coming = coming, None
                yield ready.result()
        finally:
            if coming is not None:
                coming.cancel()


class Behind:
    """Writes in the background, at most one at a time; each is waited for before the next."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._writing: Future[None] | None = None

    def add(self, function: Callable[[], None]) -> None:
        """Waits for the previous write, raising its error, and starts this one."""
        self.wait()
        self._writing = self._background.submit(function)

    def wait(self) -> None:
        """Waits for the current write, if any; raises its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
