"""The executor that a job's options ask for: Ray, or this process."""

from __future__ import annotations

import os
from collections.abc import Callable
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


def seen_by_prometheus(console: Console, config: RuntimeConfig, run: str) -> Progress:
    """The console, behind metrics where the job runs on Ray. run: the job's name in them."""
    if config.executor != "ray":
        return console
    from cluster.dispatch.metered import MeteredProgress

    return MeteredProgress(console, run)
