"""Perplexity by the convention of the field, with the same block-by-block forward as pruning.

The text is cut into sequences as `pipeline.text.tokens` describes; the perplexity is exp of the
mean next-token loss (nats). Hidden states are stored in activation shards on disk, so evaluation
needs no more memory than pruning.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.evaluate import EvalConfig
from pipeline.config.runtime import how_to_open
from pipeline.loop.block_loop import BlockLoop
from pipeline.loop.block_steps import BlockSteps
from pipeline.loop.executor import Executor
from pipeline.loop.trace import traced
from pipeline.messages import Job, Reference
from pipeline.models.skeleton import (
    Skeleton,
    check_seqlen,
    check_tokens,
    open_skeleton,
)
from pipeline.models.text_forward import text_forward
from pipeline.preflight.disk import check_evaluation_space
from pipeline.preflight.shared_folders import scratch_of
from pipeline.records.inputs import read_inputs
from pipeline.records.manifest import data_identity
from pipeline.runtime.progress import Progress
from pipeline.text.documents import hub_revision
from pipeline.text.tokenizer import describe_tokenizer, load_tokenizer
from pipeline.text.tokens import evaluation_tokens
from storage.errors import ConfigError, NumericalError
from storage.model.adapter import adapter_note
from storage.object_store import Place, absolute, location
from storage.run.activations import write_tokens
from storage.run.directory import SCRATCH_PREFIX, RunDirectory
from storage.run.lock import RunLock

_MAX_ATTEMPTS = 3


def evaluate(
    source: Place,
    config: EvalConfig,
    make_executor: Callable[[], Executor],
    progress: Progress,
) -> dict[str, Any]:
    """Measures the perplexity of the model at `source`, on an executor that it makes and closes.

    Returns what `measure_perplexity` returns. Raises an `InputError` for bad input before any
    compute.
    """
    prepared = prepare(source, config)
    check_evaluation_space(config, prepared.skeleton, len(prepared.tokens))
    executor = traced(make_executor, config.trace)
    try:
        return measure_perplexity(prepared, config, executor, progress)
    finally:
        progress.end()
        executor.close()


def compare(
    sources: Sequence[Place],
    config: EvalConfig,
    make_executor: Callable[[], Executor],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Evaluates several models on the same tokens, and compares each with the first.

    Each result has what `measure_perplexity` returns. All but the first also have `against_first`:
    `loss_difference` and its `standard_error` (nats per token: mean of the paired differences over
    sequences and its standard error, None with one sequence); `jensen_shannon` and
    `kullback_leibler` (nats, means over the predicted tokens; KL(first || this model)); and
    `same_token` (share, 0 to 1, of predicted tokens for which both models have the same most likely
    token).

    Raises an `InputError` for bad input before any compute, also for models whose tokenizers
    differ.
    """
    prepared = [prepare(source, config) for source in sources]
    for another in prepared[1:]:
        if not torch.equal(another.tokens, prepared[0].tokens):
            raise ConfigError(
                f"{another.skeleton.files.place} and {prepared[0].skeleton.files.place} make "
                "different tokens of the text; only models with the same tokenizer can be compared"
            )
    for each in prepared:
        # Room for three activation stores: the first model's last one, and two of the running one.
        check_evaluation_space(config, each.skeleton, -(-3 * len(each.tokens) // 2))
    executor = traced(make_executor, config.trace)
    try:
        with evaluated(prepared[0], config, executor, progress) as first:
            results = [first.metrics()]
            for each in prepared[1:]:
                with evaluated(each, config, executor, progress) as other:
                    results.append(other.metrics() | {"against_first": other.against(first)})
        return results
    finally:
        progress.end()
        executor.close()


@dataclass(frozen=True)
class Prepared:
    """A model and a text that have passed all checks that need no workers.

    tokens: (n, seqlen) int64. dataset: the text's name. revision: its commit on the hub, or
    `sha256:` and a file's hash. tokenizer: its class and the number of its tokens. text: what was
    read as the text and how, as JSON (see `TokenSequences`).
    """

    skeleton: Skeleton
    tokens: Tensor
    dataset: str
    revision: str
    tokenizer: dict[str, Any]
    text: dict[str, Any]


def prepare(source: Place, config: EvalConfig) -> Prepared:
    """Opens the model and tokenizes the text. Raises an `InputError` for bad input."""
    skeleton = open_skeleton(absolute(source), **how_to_open(config))
    text_forward(skeleton)  # a model whose blocks cannot be run one at a time is refused now
    check_seqlen(skeleton, config.seqlen)
    identity = data_identity(config.dataset)
    wanted = config.dataset_revision
    if identity["sha256"] is None:
        commit: str | None = hub_revision(config.dataset, wanted)
    elif wanted is None:
        commit = None
    else:
        raise ConfigError(f"--dataset-revision is of hub data sets; {config.dataset} is a file")
    tokenizer = load_tokenizer(skeleton.files.folder, config.trust_remote_code)
    cut = evaluation_tokens(
        tokenizer, config.dataset, config, config.seqlen, config.nsamples, commit
    )
    check_tokens(skeleton, cut.ids)
    revision = commit or f"sha256:{identity['sha256']}"
    described = describe_tokenizer(tokenizer)
    return Prepared(skeleton, cut.ids, identity["name"], revision, described, cut.text)


@dataclass(frozen=True)
class Evaluated:
    """A model that has been run on its tokens. Its workers and last hidden states still exist.

    losses: summed next-token loss (nats) of each sequence.
    """

    prepared: Prepared
    config: EvalConfig
    run: RunDirectory
    loop: BlockLoop
    losses: list[float]

    def metrics(self) -> dict[str, Any]:
        """What `measure_perplexity` returns. Raises `NumericalError` where it is not finite."""
        skeleton, seqlen = self.prepared.skeleton, self.config.seqlen
        predicted = len(self.losses) * (seqlen - 1)
        mean = sum(self.losses) / predicted
        if not math.isfinite(mean):
            raise NumericalError(
                f"{skeleton.files.place}: the loss is not finite; try --dtype float32"
            )
        if mean > math.log(sys.float_info.max):
            raise NumericalError(
                f"{skeleton.files.place}: the mean loss is {mean:.4g} nats a token, too much for a "
                "perplexity in float64; the model, or its tokenizer, is not fit for this text"
            )
        return {
            "perplexity": math.exp(mean),
            "tokens": len(self.losses) * seqlen,
            "predicted_tokens": predicted,
            "seqlen": seqlen,
            "nsamples": len(self.losses),
            "dataset": self.prepared.dataset,
            "dataset_revision": self.prepared.revision,
            "tokenizer": self.prepared.tokenizer,
            "text": self.prepared.text,
            "tokens_sha256": hashlib.sha256(self.prepared.tokens.numpy().tobytes()).hexdigest(),
            "dtype": str(skeleton.dtype).removeprefix("torch."),
            "attention": skeleton.attention,
        }

    def against(self, first: Evaluated) -> dict[str, float | None]:
        """The paired comparison that `compare` returns."""
        skeleton, block = first.prepared.skeleton, len(first.prepared.skeleton.blocks)
        reference = Reference(
            source=location(skeleton.files.place),
            dtype=str(skeleton.dtype).removeprefix("torch."),
            run_directory=str(first.run.path),
            block=block,
            shards=read_inputs(first.run.activation_record(block)),
        )
        distances = self.loop.distances(reference)
        each = self.config.seqlen - 1
        predicted = len(distances) * each
        differences = [
            (loss - reference_loss) / each
            for loss, reference_loss in zip(self.losses, first.losses, strict=True)
        ]
        mean, standard_error = mean_and_error(differences)
        return {
            "loss_difference": mean,
            "standard_error": standard_error if math.isfinite(standard_error) else None,
            "jensen_shannon": sum(d.jensen_shannon for d in distances) / predicted,
            "kullback_leibler": sum(d.kullback_leibler for d in distances) / predicted,
            "same_token": sum(d.same for d in distances) / predicted,
        }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of some values and its standard error, which is NaN for a single value."""
    count = len(values)
    spread = statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return statistics.fmean(values), spread


def measure_perplexity(
    prepared: Prepared, config: EvalConfig, executor: Executor, progress: Progress
) -> dict[str, Any]:
    """Measures the perplexity; restarts the ranks of `executor` for this model.

    Returns `perplexity`, `tokens` (number in the text), `predicted_tokens` (those with a loss: all
    but the first of each sequence), `seqlen`, `nsamples`, `dataset`, `dataset_revision` (a commit
    of the hub, or `sha256:` and a file's hash), `tokenizer` (`class` and number of `tokens`),
    `text` (what was read as the text and how: see `text_in_words`),
    `tokens_sha256` (of the tokens as int64, by which text and tokenizer are compared), `dtype`,
    `attention` (transformers' name of how it was computed).

    Raises `NumericalError` if the loss is not finite.
    """
    with evaluated(prepared, config, executor, progress) as evaluation:
        return evaluation.metrics()


@contextlib.contextmanager
def evaluated(
    prepared: Prepared, config: EvalConfig, executor: Executor, progress: Progress
) -> Iterator[Evaluated]:
    """Runs a model block by block; restarts the ranks of `executor` for it."""
    with started(prepared.skeleton, prepared.tokens, config, executor, progress) as (run, loop):
        yield Evaluated(prepared, config, run, loop, loop.losses())


@contextlib.contextmanager
def started(
    skeleton: Skeleton, tokens: Tensor, config: EvalConfig, executor: Executor, progress: Progress
) -> Iterator[tuple[RunDirectory, BlockLoop]]:
    """A started block loop over `tokens`, (n, seqlen) int64, in a temporary run directory."""
    if note := adapter_note(skeleton.files.folder, skeleton.files.place):
        progress.note(note)
    with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=config.scratch_dir) as scratch:
        run = RunDirectory(Path(scratch).absolute())
        stored = write_tokens(run.tokens(), tokens)
        with RunLock(run.path) as lock:
            progress.begin("evaluating", len(skeleton.blocks), 0)
            progress.phase("start workers")
            steps = BlockSteps(executor, run, lock, progress, len(skeleton.blocks))
            loop = BlockLoop(steps, max_attempts=_MAX_ATTEMPTS)
            loop.start(_job(config, skeleton, run, len(tokens), stored.sha256, executor))
            yield run, loop


def _job(
    config: EvalConfig,
    skeleton: Skeleton,
    run: RunDirectory,
    nsamples: int,
    tokens_sha256: str,
    executor: Executor,
) -> Job:
    return Job(
        source=location(skeleton.files.place),
        run_directory=str(run.path),
        tokens_sha256=tokens_sha256,
        rules=None,
        nsamples=nsamples,
        seqlen=config.seqlen,
        batch_size=config.batch_size,
        dtype=config.dtype,
        device=config.device,
        threads=executor.threads,
        trust_remote_code=config.trust_remote_code,
        source_identity=skeleton.files.identity(),
        shared=scratch_of(run),
        interface=config.network_interface,
        attn_implementation=config.attn_implementation,
    )
