"""`prox24 eval`: perplexities, differences between models, and zero-shot tasks, printed."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich.box
from rich.table import Table

from cluster.command import Command
from cluster.console import Console
from cluster.dispatch.executors import connected_early, make_executor
from cluster.options import config_from, path_text
from cluster.source import MODEL_HELP, resolve_model
from cluster.terminal import as_text, plain_table
from pipeline.config.evaluate import EvalConfig
from pipeline.text.files import check_dataset
from storage.errors import ConfigError
from storage.files.trial import require_folder
from storage.model.folder import Source

if TYPE_CHECKING:
    from pipeline.loop.executor import Executor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `prox24 eval` beside the options of its config class."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        type=path_text,
        help=f"{MODEL_HELP}; of several, each is compared with the first: "
        "paired difference of the loss, divergence, and share of equal most likely tokens",
    )


def run(options: argparse.Namespace) -> int:
    """Evaluates and prints; returns the exit status, 0."""
    config: EvalConfig = config_from(options, EvalConfig)
    if config.tasks is None:
        check_dataset(config.dataset)
    elif config.tasks_folder is not None and not Path(config.tasks_folder).is_dir():
        raise ConfigError(f"--tasks-folder {config.tasks_folder} is not a folder")
    scratch = Path(config.scratch_dir or tempfile.gettempdir())
    if not scratch.is_dir():
        raise ConfigError(f"--scratch-dir {scratch} is not a folder; make it, or name another one")
    require_folder(scratch, "--scratch-dir", "name another folder")
    sources = [resolve_model(model) for model in options.models]
    console = Console()
    if config.tasks is not None:
        shown, text = _tasks(sources, config, make_executor(config, console), console)
    else:
        module = "pipeline.evaluation.perplexity"
        with connected_early(config, console, module=module, place=True) as make:
            shown, text = _perplexity(sources, config, make, console)
    print(json.dumps(shown) if config.json else text, end="\n" if config.json else "")
    return 0


def _perplexity(
    sources: Sequence[Source],
    config: EvalConfig,
    make_executor: Callable[[], Executor],
    console: Console,
) -> tuple[dict[str, Any], str]:
    """One model's perplexity, or the comparison of several: as JSON, and as text."""
    from pipeline.evaluation.perplexity import compare, evaluate
    from pipeline.records.evaluation import finite

    if len(sources) == 1:
        result = {
            "model": sources[0].name,
            **evaluate(sources[0].folder, config, make_executor, console),
        }
        return result, perplexity_text(result)
    results = compare([source.folder for source in sources], config, make_executor, console)
    named = [
        {"model": source.name, **result} for source, result in zip(sources, results, strict=True)
    ]
    # A divergence may be infinite, which JSON has no number for.
    return {"models": [finite(model) for model in named]}, comparison_table(named)


def _tasks(
    sources: Sequence[Source],
    config: EvalConfig,
    make_executor: Callable[[], Executor],
    console: Console,
) -> tuple[dict[str, Any], str]:
    """The models' metrics in tasks of lm-eval: as JSON, and as text."""
    try:
        from pipeline.evaluation.lm_eval_tasks import evaluate_tasks
    except ModuleNotFoundError as error:
        raise ConfigError(f"--tasks needs lm-eval ({error}): pip install prox24[tasks]") from error
    results = evaluate_tasks(sources, config, make_executor, console)
    return results, tasks_text(results)


def perplexity_text(result: dict[str, Any]) -> str:
    """One model's perplexity as two lines of text."""
    return (
        f"perplexity {result['perplexity']:.4f} on {result['dataset']} "
        f"({result['nsamples']} x {result['seqlen']} tokens, {result['dtype']})\n"
        f"{provenance(result)}\n{text_line(result)}"
    )


def comparison_table(results: list[dict[str, Any]]) -> str:
    """The perplexities of several models, and how each differs from the first, as text."""
    first = results[0]
    table = plain_table(("model", "perplexity", "loss", "JS", "KL", "top-1"))
    for result in results:
        cells = [str(result["model"]), f"{result['perplexity']:.4f}"]
        if against := result.get("against_first"):
            cells += [
                _with_error(against["loss_difference"], against["standard_error"], "+"),
                f"{against['jensen_shannon']:.4f}",
                f"{against['kullback_leibler']:.4f}",
                f"{100 * against['same_token']:.2f} %",
            ]
        table.add_row(*cells)
    return as_text(
        [
            f"{first['dataset']}, {first['nsamples']} x {first['seqlen']} tokens; differences from "
            f"{first['model']}",
            table,
            "Loss, JS and KL in nats a token; the loss with the standard error of its mean "
            f"difference over the {first['nsamples']} sequences, paired.",
            provenance(first),
            text_line(first),
        ]
    )


def text_line(result: dict[str, Any]) -> str:
    """What was read as the text, in a line, and what is odd about it."""
    from pipeline.text.sequences import text_in_words

    line = f"text: {text_in_words(result['text'])}\n"
    return line + (f"note: {result['text']['note']}\n" if "note" in result["text"] else "")


def provenance(result: dict[str, Any]) -> str:
    """What a perplexity was measured with: the text's commit or hash, and the tokenizer."""
    tokenizer = result["tokenizer"]
    kind, _, value = result["dataset_revision"].rpartition(":")
    return (
        f"dataset {kind or 'revision'} {value[:12]}, tokenizer {tokenizer['class']} of "
        f"{tokenizer['tokens']} tokens"
    )


def tasks_text(results: dict[str, Any]) -> str:
    """What `evaluate_tasks` returns, as a table of at most 80 columns."""
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for title in ("task", "metric", "model"):
        table.add_column(title, overflow="fold")
    for title in ("value", "difference"):
        table.add_column(title, justify="right", no_wrap=True)
    models = results["models"]
    for task, metrics in models[0]["tasks"].items():
        for name in metrics:
            for index, model in enumerate(models):
                metric = model["tasks"][task][name]
                against = metric.get("against_first")
                table.add_row(
                    "" if index else task,
                    "" if index else name,
                    model["model"],
                    _with_error(metric["value"], metric["standard_error"], ""),
                    _with_error(against["difference"], against["standard_error"], "+")
                    if against
                    else "",
                )
    shots = ", ".join(f"{task} {count}" for task, count in results["num_fewshot"].items())
    return as_text(
        [
            table,
            f"lm-eval {results['lm_eval']}; examples before each question: {shots}.",
            "With standard errors; differences are from the first model, paired by document.",
        ]
    )


def _with_error(value: float, error: float | None, sign: str) -> str:
    spread = "" if error is None else f" ± {error:.4f}"
    return f"{value:{sign}.4f}{spread}"


COMMAND = Command(
    name="eval",
    help="measure perplexities, and compare models",
    config=EvalConfig,
    arguments=add_arguments,
    run=run,
)
