"""Threads for kernels that release Python's global lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

_THREAD_GROUPS = 1 << 12  # groups per thread below which another thread does not pay


def in_threads(work: Callable[[int, int], object], count: int, threads: int) -> None:
    """Call `work` on consecutive ranges of `count` groups, at most `threads` at a time."""
    threads = max(1, min(threads, count // _THREAD_GROUPS))
    share = max(1, -(-count // threads))
    # The pool is cached: starting threads costs more time than a small pass.
    others = [
        _pool(os.getpid(), threads - 1).submit(work, start, min(start + share, count))
        for start in range(share, count, share)
    ]
    work(0, min(share, count))
    for other in others:
        other.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Helper threads, per process id: a forked child inherits the cache, but not the threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"prox24-{process}")
