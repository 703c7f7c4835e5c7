"""The options of `prox24 eval` that are of tasks."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.option import option, require
from storage.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which tasks, and how. Raises `ConfigError` on a value out of range."""

    tasks: str | None = option(
        None,
        "zero-shot tasks of lm-eval, with commas between (arc_easy,hellaswag), in place of "
        "perplexity; needs prox24[tasks]",
    )
    tasks_folder: str | None = option(
        None, "folder of task definitions of your own, as lm-eval's YAML files"
    )
    num_fewshot: int | None = option(None, "examples before each question; unset: the task's own")

    def __post_init__(self) -> None:
        require(self, "num_fewshot", at_least=0)
        if self.tasks is None and (self.tasks_folder, self.num_fewshot) != (None, None):
            raise ConfigError("--tasks-folder and --num-fewshot are of --tasks, which is not given")
