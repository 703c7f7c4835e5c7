"""Likelihoods of given continuations, block by block, as multiple-choice tasks need them.

Sequences are padded on the right to a power of two, which does not affect a causal model's results.
All sequences of one width are run in one pass over the model's blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.config.evaluate import EvalConfig
from pipeline.evaluation.perplexity import started
from pipeline.loop.executor import Executor
from pipeline.messages import Target
from pipeline.models.from_config import longest_input
from pipeline.models.skeleton import Skeleton, check_tokens
from pipeline.models.text_forward import text_forward
from pipeline.preflight.disk import check_evaluation_space
from pipeline.runtime.progress import Progress
from storage.errors import ConfigError

Tokens = tuple[int, ...]

_NARROWEST = 16
# Tokens of a sequence, for a config without `max_position_embeddings`.
_DEFAULT_LONGEST = 2048


@dataclass(frozen=True)
class Batch:
    """Sequences of one width. asked: by sequence, its targets: (number of the request, target)."""

    width: int
    sequences: tuple[Tokens, ...]
    asked: tuple[tuple[tuple[int, Target], ...], ...]


def longest_sequence(skeleton: Skeleton) -> int:
    """The largest number of tokens that the model's config allows; 2,048 if it has none."""
    return longest_input(skeleton.model.config) or _DEFAULT_LONGEST


def batches(requests: Iterable[tuple[Sequence[int], Sequence[int]]], longest: int) -> list[Batch]:
    """Requests (context, continuation), in tokens, as sequences grouped by width, narrowest first.

    A sequence is the context and the continuation without its last token, after which nothing is
    predicted. If it is longer than `longest`, its beginning is cut. Requests with the same sequence
    (continuations of one token) share it.

    Raises `ConfigError` for an empty context, or a continuation that is empty or longer than
    `longest`.
    """
    asked: dict[Tokens, list[tuple[int, Target]]] = {}
    for number, (context, continuation) in enumerate(requests):
        if not context or not 0 < len(continuation) <= longest:
            raise ConfigError(
                f"request {number} of the tasks has {len(context)} tokens of context and "
                f"{len(continuation)} to score, of {longest} at most: not a task for this model"
            )
        sequence = (*context, *continuation)[-(longest + 1) : -1]
        target = Target(len(sequence) - len(continuation), tuple(continuation))
        asked.setdefault(sequence, []).append((number, target))
    by_width: dict[int, list[Tokens]] = {}
    for sequence in asked:
        width = min(max(_NARROWEST, 1 << (len(sequence) - 1).bit_length()), longest)
        by_width.setdefault(width, []).append(sequence)
    return [
        Batch(width, tuple(sequences), tuple(tuple(asked[sequence]) for sequence in sequences))
        for width, sequences in sorted(by_width.items())
    ]


def log_likelihoods(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    skeleton: Skeleton,
    config: EvalConfig,
    executor: Executor,
    progress: Progress,
) -> list[tuple[float, bool]]:
    """By request (context, continuation), in tokens: the log-likelihood (nats) of the continuation
    after the context, and whether greedy decoding would give it.

    Raises an `InputError` for requests that do not fit the model, and for too little disk space.
    """
    results: dict[int, tuple[float, bool]] = {}
    text_forward(skeleton)  # a model whose blocks cannot be run one at a time is refused now
    check_tokens(skeleton, torch.tensor([t for pair in requests for part in pair for t in part]))
    for batch in batches(requests, longest_sequence(skeleton)):
        tokens = torch.zeros((len(batch.sequences), batch.width), dtype=torch.int64)
        for row, sequence in zip(tokens, batch.sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        batch_config = replace(config, seqlen=batch.width)
        check_evaluation_space(batch_config, skeleton, len(tokens))
        targets = [[target for _, target in asked] for asked in batch.asked]
        with started(skeleton, tokens, batch_config, executor, progress) as (_, loop):
            answers = loop.likelihoods(targets)
        for asked, answer in zip(batch.asked, answers, strict=True):
            results |= {number: value for (number, _), value in zip(asked, answer, strict=True)}
    return [results[number] for number in range(len(requests))]
