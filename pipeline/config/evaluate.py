"""The options of `prox24 eval`: the text, or the tasks, that models are evaluated on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.fields import Given, option, require
from pipeline.config.runtime import RuntimeConfig
from pipeline.config.text import FILES, TextOptions
from storage.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The options of lm-eval's tasks. Raises `ConfigError` for a value out of range."""

    tasks: str | None = option(
        None,
        "zero-shot tasks of lm-eval, with commas between (arc_easy,hellaswag), in place of "
        "perplexity; needs prox24[tasks]",
    )
    tasks_folder: str | None = option(
        None, "folder with task definitions of your own, as lm-eval's YAML files", path=True
    )
    num_fewshot: int | None = option(
        None, "examples before each question; unset: the task's default"
    )

    def __post_init__(self) -> None:
        require(self, "num_fewshot", at_least=0)
        if self.tasks is None and (self.tasks_folder, self.num_fewshot) != (None, None):
            raise ConfigError("--tasks-folder and --num-fewshot need --tasks, which is not given")


def unless_text(config: Any) -> str | None:
    """The condition of what concerns the text of a perplexity."""
    return None if config.tasks is None else "--tasks stands in place of a text"


@dataclass(frozen=True, kw_only=True)
class EvalConfig(TaskOptions, TextOptions, RuntimeConfig, Given):
    """Every option of `prox24 eval`. Raises `ConfigError` for a value out of range."""

    dataset: str = option(
        "Salesforce/wikitext",
        "text to evaluate on: a hub id (Salesforce/wikitext is read as wikitext-2-raw-v1, test; "
        "allenai/c4 as en, the first 256 sequences of validation) or " + FILES,
        path=True,
        unused=unless_text,
    )
    dataset_revision: str | None = option(
        None,
        "commit, tag or branch of a hub data set; unset: its newest commit, which is stated",
        unused=unless_text,
    )
    seqlen: int = option(
        2048, "tokens of a sequence; perplexities of other lengths differ", unused=unless_text
    )
    nsamples: int | None = option(None, "sequences, or documents of a task; unset: the whole text")
    json: bool = option(False, "print one JSON object on standard output and nothing else there")
    scratch_dir: str | None = option(
        None,
        "folder for hidden states while it runs; unset: the system's temporary folder",
        path=True,
    )

    def without_text(self) -> str | None:
        """As `unless_text` says."""
        return unless_text(self)

    def __post_init__(self) -> None:
        RuntimeConfig.__post_init__(self)
        TaskOptions.__post_init__(self)
        require(self, "nsamples", at_least=1)
        require(self, "seqlen", at_least=2)  # a loss needs a next token
