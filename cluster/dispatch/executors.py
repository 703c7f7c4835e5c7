"""The executor that a job's options ask for: Ray, or this process."""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cluster.console import Console
from pipeline.config.runtime import RuntimeConfig
from pipeline.runtime.progress import Progress

if TYPE_CHECKING:
    from pipeline.loop.executor import Executor


def make_executor(config: RuntimeConfig, console: Console) -> Callable[[], Executor]:
    """The executor that the config asks for, made when called. Ray is imported only for Ray."""

    def make() -> Executor:
        if config.executor == "local":
            from pipeline.worker.local_executor import LocalExecutor

            world = config.workers or 1
            cores = len(os.sched_getaffinity(0))
            return LocalExecutor(world, config.threads or max(1, cores // world))
        from cluster.dispatch.ray_executor import RayExecutor

        return RayExecutor(config, console.note)

    return make


@contextlib.contextmanager
def connected_early(
    config: RuntimeConfig, console: Console, *, module: str, place: bool
) -> Iterator[Callable[[], Executor]]:
    """`make_executor`, but a running cluster is connected to now, while `module` is imported.

    place: start the workers there as well, if there is room for them now.

    An executor that nobody asked for, because the job was refused, is closed. A Ray of our own is
    not started early: ending it again would keep a refusal waiting for seconds.
    """
    if config.executor != "ray":
        yield make_executor(config, console)
        return
    from cluster.dispatch.connection import cluster_address

    if cluster_address(config) is None:
        yield make_executor(config, console)
        return
    from cluster.dispatch.ray_executor import RayExecutor

    # A daemon: a refusal need not wait for it.
    threading.Thread(target=_import_ahead, args=(module,), daemon=True).start()
    executor = RayExecutor(config, console.note)
    taken = False

    def take() -> Executor:
        nonlocal taken
        taken = True
        return executor

    try:
        if place:
            executor.prepare_if_free()
        yield take
    finally:
        if not taken:
            executor.close()


def _import_ahead(module: str) -> None:
    """Imports the module, for whoever imports it next. An error is raised there, not here."""
    with contextlib.suppress(Exception):
        importlib.import_module(module)


def seen_by_prometheus(console: Console, config: RuntimeConfig, run: str) -> Progress:
    """The console, behind metrics where the job runs on Ray. run: the job's name in them."""
    if config.executor != "ray":
        return console
    from cluster.dispatch.metered import MeteredProgress

    return MeteredProgress(console, run)
