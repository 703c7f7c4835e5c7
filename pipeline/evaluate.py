"""Perplexity by the field's convention, through the same block-by-block forward as pruning.

The text is joined, tokenized once and cut in pieces of `seqlen` (method.md, conventions); the
result is exp of the mean next-token loss. Hidden states go through activation stores on disk, so
that evaluating needs no more memory than pruning.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.calibration import evaluation_tokens, load_tokenizer
from pipeline.config import EvalConfig
from pipeline.executor import Executor
from pipeline.job import Job
from pipeline.loop import BlockLoop
from pipeline.manifest import data_identity
from pipeline.model import Skeleton, check_seqlen, check_tokens, open_skeleton
from pipeline.progress import Progress
from pipeline.space import check_evaluation_space
from pipeline.trace import traced
from storage.arrow_store import write_tokens
from storage.errors import NumericalError
from storage.lock import RunLock
from storage.object_store import Place, absolute, location
from storage.run_directory import SCRATCH_PREFIX, RunDirectory


def evaluate(
    source: Place,
    config: EvalConfig,
    make_executor: Callable[[], Executor],
    progress: Progress,
) -> dict[str, Any]:
    """Perplexity of the model at `source`, on an executor that is made for it.

    Returns what `measure_perplexity` returns. Raises an `InputError` for bad input before any
    compute.
    """
    prepared = prepare(source, config)
    check_evaluation_space(config, prepared.skeleton, len(prepared.tokens))
    executor = traced(make_executor(), config.trace)
    try:
        return measure_perplexity(prepared, config, executor, progress)
    finally:
        progress.end()
        executor.close()


@dataclass(frozen=True)
class Prepared:
    """What can be checked without workers has been: the skeleton, the tokens, the text's name."""

    skeleton: Skeleton
    tokens: Tensor
    dataset: str


def prepare(source: Place, config: EvalConfig) -> Prepared:
    """Opens the model and tokenizes the text. Raises an `InputError` for bad input."""
    skeleton = open_skeleton(
        absolute(source), dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )
    check_seqlen(skeleton, config.seqlen)
    identity = data_identity(config.dataset)
    tokenizer = load_tokenizer(skeleton.files.folder, config.trust_remote_code)
    tokens = evaluation_tokens(
        tokenizer, config.dataset, config.text_column, config.seqlen, config.nsamples
    )
    check_tokens(skeleton, tokens)
    return Prepared(skeleton, tokens, identity["name"])


def measure_perplexity(
    prepared: Prepared, config: EvalConfig, executor: Executor, progress: Progress
) -> dict[str, Any]:
    """Perplexity, with the ranks of `executor` started anew for this model.

    Returns `perplexity`, `tokens` (of text evaluated), `predicted_tokens` (those with a loss: all
    but the first of each sequence), `seqlen`, `nsamples`, `dataset`, `dtype`.

    Raises `NumericalError` where the loss is not finite.
    """
    skeleton, tokens = prepared.skeleton, prepared.tokens
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=config.scratch_dir) as scratch:
        run = RunDirectory(Path(scratch).absolute())
        stored = write_tokens(run.tokens(), tokens)
        with RunLock(run.path) as lock:
            progress.begin("evaluating", len(skeleton.blocks), 0)
            progress.phase("start workers")
            loop = BlockLoop(
                executor=executor,
                run=run,
                lock=lock,
                progress=progress,
                blocks=len(skeleton.blocks),
                layers=(),
                dtypes=(),
                calibrates=True,
                chooses=False,
                max_attempts=3,
            )
            loop.start(
                _job(config, skeleton.files.place, run, len(tokens), stored.sha256, executor)
            )
            losses = [loss for outcome in loop.evaluate() for loss in outcome.value]
    predicted = len(losses) * (config.seqlen - 1)
    mean = sum(losses) / predicted
    if not math.isfinite(mean):
        raise NumericalError(f"{skeleton.files.place}: the loss is not finite; try --dtype float32")
    return {
        "perplexity": math.exp(mean),
        "tokens": len(losses) * config.seqlen,
        "predicted_tokens": predicted,
        "seqlen": config.seqlen,
        "nsamples": len(losses),
        "dataset": prepared.dataset,
        "dtype": str(skeleton.dtype).removeprefix("torch."),
    }


def _job(
    config: EvalConfig,
    place: Place,
    run: RunDirectory,
    nsamples: int,
    tokens_sha256: str,
    executor: Executor,
) -> Job:
    return Job(
        source=location(place),
        run_directory=str(run.path),
        tokens_sha256=tokens_sha256,
        settings=None,
        nsamples=nsamples,
        seqlen=config.seqlen,
        batch_size=config.batch_size,
        dtype=config.dtype,
        device=config.device,
        threads=executor.threads,
        skip_unsupported=True,
        trust_remote_code=config.trust_remote_code,
    )
