"""One thread for what the device need not wait for: reading ahead, writing behind.

Hashing, copying and disk calls let go of Python's lock, so they run beside the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Background:
    """Runs functions one after another in a thread of its own, made when first needed."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, function: Callable[[], R]) -> Future[R]:
        """Begins with `function` once what was submitted before is done."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="prox24-background")
        return self._pool.submit(function)

    def ahead(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`map(function, items)`, the next result being made while the caller uses the last one."""
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
    """Writes that are waited for one write later; at most one is under way."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._writing: Future[None] | None = None

    def add(self, function: Callable[[], None]) -> None:
        """Waits for the write before, raising its error, and begins with this one."""
        self.wait()
        self._writing = self._background.submit(function)

    def wait(self) -> None:
        """Waits for the write that is under way; raises its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
