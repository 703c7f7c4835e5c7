"""Work in pieces on several threads, with bytes that do not depend on how many threads there are.

torch and its libraries divide an operation by the number of their threads, and another division
rounds differently. So here torch always computes on one thread (`make_deterministic`). Work that
takes long is cut into pieces, by its shape alone; one thread computes a piece, and as many pieces
are computed at a time as there are threads.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.runtime.split import ROW_TILE

T = TypeVar("T")

# More pieces keep more threads busy. Products of fewer rows take longer: of 256 rows 5 to 10 %.
MOST_PIECES = 16
LEAST_ROWS = 256

_count = 1
# Whether this thread computes a piece: what it cuts into pieces itself is then done here.
_state = threading.local()


def set_threads(count: int) -> None:
    """Sets how many pieces this process computes at a time; torch uses one thread from now on."""
    global _count
    _count = count
    torch.set_num_threads(1)


def threads() -> int:
    """How many pieces are computed at a time; 1 inside of a piece."""
    return 1 if getattr(_state, "inside", False) else _count


def pieces_of(count: int, least: int = LEAST_ROWS) -> list[slice]:
    """Cuts `count` rows into 1, 2, 4, 8 or 16 equal pieces of about `least` rows or more.

    As many rows are always cut in the same way. No rows are one piece, too.
    """
    number = 1
    while number < MOST_PIECES and count >= 2 * number * least:
        number *= 2
    step = max(-(-count // (number * ROW_TILE)) * ROW_TILE, 1)
    return [slice(start, min(start + step, count)) for start in range(0, max(count, 1), step)]


def row_pieces(rows: Tensor, least: int = LEAST_ROWS) -> list[slice]:
    """`pieces_of` the rows of (R, ...) on a CPU. Another device divides its work itself: one."""
    if rows.device.type != "cpu":
        return [slice(0, len(rows))]
    return pieces_of(len(rows), least)


def shares(count: int, least: int) -> list[slice]:
    """Cuts `count` items evenly for the threads, where the cut changes no byte: `least` or more."""
    number = max(1, min(threads(), count // least))
    step = max(1, -(-count // number))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def in_pieces(work: Callable[[T], object], pieces: Sequence[T]) -> None:
    """Calls `work` with each of the pieces, on up to `threads()` threads, without gradients.

    Returns when all are done. After an error no further piece is begun, and it is raised.
    """
    lanes = min(threads(), len(pieces))
    if lanes < 2:
        for piece in pieces:
            work(piece)
        return
    left = deque(pieces)

    def lane() -> None:
        _state.inside = True
        try:
            # A thread has its own setting of gradients.
            with torch.no_grad():
                while left:
                    try:
                        piece = left.popleft()
                    except IndexError:  # another lane took the last one
                        return
                    work(piece)
        except BaseException:
            left.clear()
            raise
        finally:
            _state.inside = False

    # The pool is kept: starting threads takes longer than a small piece.
    others = [_pool(os.getpid(), _count - 1).submit(lane) for _ in range(lanes - 1)]
    try:
        lane()
    finally:
        # Also after an error: the others still write to what the caller gave them.
        errors = [other.exception() for other in others]
    for error in errors:
        if error is not None:
            raise error


@cache
def _pool(process: int, helpers: int) -> ThreadPoolExecutor:
    """Helper threads, per process id: a forked child inherits the cache, but not the threads."""
    return ThreadPoolExecutor(
        helpers,
        thread_name_prefix=f"prox24-{process}",
        # The libraries below torch have a setting of their own for each thread.
        initializer=partial(torch.set_num_threads, 1),
    )
