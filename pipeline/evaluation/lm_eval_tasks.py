"""Zero-shot tasks by lm-eval, whose requests the block loop answers: `prox24 eval --tasks`.

lm-eval (the extra prox24[tasks]) makes the prompts and computes the metrics; models run block by
block, as everywhere here. Imported only where --tasks is given: lm-eval imports `datasets`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.api.task
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate as run_tasks
from lm_eval.tasks import TaskManager

from pipeline.config.evaluate import EvalConfig
from pipeline.config.runtime import how_to_open
from pipeline.evaluation.likelihood import log_likelihoods
from pipeline.evaluation.task_scores import Metric, task_metrics
from pipeline.loop.executor import Executor
from pipeline.loop.trace import traced
from pipeline.models.skeleton import Skeleton, open_skeleton
from pipeline.runtime.progress import Progress
from pipeline.text.tokenizer import load_tokenizer
from storage.errors import ConfigError, DataError, InputError, first_line
from storage.files.listing import files_below
from storage.files.os_errors import raise_file_error
from storage.model.folder import Source

# lm-eval's default seed for drawing the examples before a question.
_FEWSHOT_SEED = 1234
_ANSWERED = ("multiple_choice", "loglikelihood")


class BlockwiseModel(TemplateLM):  # type: ignore[misc]
    """A model as lm-eval sees it: tokenizes as lm-eval's `hf` model, and scores block by block.

    score: the log-likelihood of each continuation given its context, both as tokens, and whether
    greedy decoding would give that continuation.
    """

    def __init__(
        self,
        tokenizer: Any,
        score: Callable[[Sequence[tuple[list[int], list[int]]]], list[tuple[float, bool]]],
    ) -> None:
        super().__init__()
        self.tokenizer, self._score = tokenizer, score

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty context is replaced with."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text; with special tokens, unless the text begins with them already."""
        options: dict[str, Any] = {"verbose": False}
        prefix = self.tokenizer.decode(self.prefix_token_id)
        if add_special_tokens is not None:
            options["add_special_tokens"] = add_special_tokens
        elif prefix and string.startswith(prefix):
            options["add_special_tokens"] = False
        ids: list[int] = self.tokenizer(string, **options).input_ids
        return ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As the base class, without its progress bar: prox24 shows one of its own."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Never called: `load_tasks` refuses such tasks."""
        raise ConfigError("tasks that score whole texts are not supported")

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Never called: `load_tasks` refuses such tasks."""
        raise ConfigError("tasks that generate text are not supported")


def find_tasks(config: EvalConfig) -> tuple[TaskManager, list[str]]:
    """lm-eval's catalogue of tasks, and the names of those that `--tasks` asks for.

    The more than ten thousand tasks that come with lm-eval are searched only where --tasks-folder
    does not have all of them. Raises `ConfigError` for names that it does not know, and
    for code in --tasks-folder without --trust-remote-code.
    """
    names = [name.strip() for name in (config.tasks or "").split(",") if name.strip()]
    folder = config.tasks_folder
    if folder is not None:
        _check_folder(Path(folder), config.trust_remote_code)
        manager = TaskManager(include_path=folder, include_defaults=False)
        if names and set(names) <= set(manager.all_tasks):
            return manager, names
    manager = TaskManager(include_path=folder)
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown or not names:
        raise ConfigError(
            f"--tasks {config.tasks}: lm-eval {lm_eval.__version__} knows no task "
            f"{', '.join(unknown) or 'of no name'}; `lm-eval ls tasks` lists them, --tasks-folder "
            "adds your own"
        )
    return manager, names


def load_tasks(manager: TaskManager, names: list[str], config: EvalConfig) -> dict[str, Any]:
    """The tasks as lm-eval wants them, their data loaded.

    Raises `ConfigError` for tasks that generate text, `DataError` for data that cannot be loaded.
    """
    try:
        loaded: dict[str, Any] = manager.load(names)
    except Exception as error:  # lm-eval, datasets and the hub's client share no root
        raise_file_error(error)
        raise DataError(
            f"--tasks {config.tasks}: their data cannot be loaded ({type(error).__name__}: "
            f"{first_line(error)}): check the network, or give local data with --tasks-folder"
        ) from error
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE not in _ANSWERED:
            raise ConfigError(
                f"--tasks: {name} is a task of kind {task.OUTPUT_TYPE}; prox24 runs those of "
                f"{' and '.join(_ANSWERED)}"
            )
        default = task.get_config("num_fewshot")
        # As lm-eval does: what a task sets to 0 stays 0.
        if default is None or (default != 0 and config.num_fewshot is not None):
            task.set_config(key="num_fewshot", value=config.num_fewshot or 0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def _check_folder(folder: Path, trust_remote_code: bool) -> None:
    if not folder.is_dir():
        raise ConfigError(f"--tasks-folder {folder} is not a folder")
    paths = (path for path in files_below(folder) if fnmatch.fnmatchcase(path.name, "*.y*ml"))
    for path in sorted(paths):
        text = path.read_text(encoding="utf-8", errors="replace")
        if "!function" in text and not trust_remote_code:
            raise ConfigError(f"{path} runs code (!function); --trust-remote-code allows it")


def evaluate_tasks(
    sources: Sequence[Source],
    config: EvalConfig,
    make_executor: Callable[[], Executor],
    progress: Progress,
) -> dict[str, Any]:
    """Every model's metrics; each model but the first is compared with it, paired by document.

    Returns `lm_eval` (its version), `num_fewshot` by task, and `models`: `model` and `tasks`, task
    -> metric -> `value`, `standard_error`, `documents`, and for models after the first
    `against_first`: `difference` and its `standard_error`. An unknown number is None.
    Raises an `InputError` for bad input before any compute.
    """
    if not config.verbose:
        _quieten()
    manager, names = find_tasks(config)
    load_tasks(manager, names, config)
    skeletons = [open_skeleton(source.folder, **how_to_open(config)) for source in sources]
    executor = traced(make_executor, config.trace)
    try:
        metrics, fewshot = [], {}
        for skeleton in skeletons:
            # Loaded again for each model: a task's generator of examples keeps its state.
            tasks = load_tasks(manager, names, config)
            fewshot = {n: task.get_config("num_fewshot") for n, task in tasks["tasks"].items()}
            metrics.append(_metrics(tasks, skeleton, config, executor, progress))
    finally:
        progress.end()
        executor.close()
    return {
        "lm_eval": lm_eval.__version__,
        "num_fewshot": fewshot,
        "models": [
            {"model": source.name, "tasks": _as_json(each, metrics[0] if index else None)}
            for index, (source, each) in enumerate(zip(sources, metrics, strict=True))
        ],
    }


def _metrics(
    tasks: dict[str, Any],
    skeleton: Skeleton,
    config: EvalConfig,
    executor: Executor,
    progress: Progress,
) -> dict[str, dict[str, Metric]]:
    model = BlockwiseModel(
        load_tokenizer(skeleton.files.folder, config.trust_remote_code),
        lambda requests: log_likelihoods(requests, skeleton, config, executor, progress),
    )
    progress.phase("make prompts")
    try:
        with _without_its_bar():
            results = run_tasks(
                model, tasks, limit=config.nsamples, bootstrap_iters=0, log_samples=True
            )
    except (ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise ConfigError(f"--tasks {config.tasks}: lm-eval: {first_line(error)}") from error
    return task_metrics(results)


def _quieten() -> None:
    """Turns off the progress bars of `datasets` and the warnings of lm-eval."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@contextlib.contextmanager
def _without_its_bar() -> Iterator[None]:
    """lm-eval draws a bar while it makes prompts, terminal or not, with no option to disable it."""
    module = lm_eval.api.task
    drawn = module.tqdm
    module.tqdm = partial(drawn, disable=True)
    try:
        yield
    finally:
        module.tqdm = drawn


def _as_json(
    metrics: dict[str, dict[str, Metric]], first: dict[str, dict[str, Metric]] | None
) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for task, by_name in metrics.items():
        for name, metric in by_name.items():
            result: dict[str, Any] = {
                "value": metric.value,
                "standard_error": _known(metric.standard_error),
                "documents": None if metric.documents is None else len(metric.documents),
            }
            if first is not None:
                difference, spread = metric.against(first[task][name])
                result["against_first"] = {
                    "difference": difference,
                    "standard_error": _known(spread),
                }
            tasks.setdefault(task, {})[name] = result
    return tasks


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
