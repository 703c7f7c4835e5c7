"""Calibration tokens of which only some count, without a text: in turns, as in a conversation."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.config.prune import PruneConfig
from pipeline.models.skeleton import Skeleton
from pipeline.text.sequences import TokenSequences

LETTERS = 256
ON_RESPONSES = {"calibrate_on": "responses"}


def random_ids(nsamples: int, seqlen: int) -> Tensor:
    """(nsamples, seqlen) int64, the same ones each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, LETTERS, (nsamples, seqlen), generator=generator)


def turns(nsamples: int, seqlen: int) -> Tensor:
    """(nsamples, seqlen) bool: runs of tokens that count, of different lengths.

    No token of the first sequence counts; of the second, and of the last but one, a single one.
    """
    generator = torch.Generator().manual_seed(2)
    ends = torch.rand(nsamples, seqlen, generator=generator) < 0.2
    counted = ends.cumsum(dim=1) % 2 == 1
    counted[0] = False
    for few in {1, nsamples - 2} - {0}:
        counted[few] = False
        counted[few, seqlen // 2] = True
    return counted


def cut_turns(_: Skeleton, config: PruneConfig) -> TokenSequences:
    """Stands for a text of conversations."""
    shape = config.nsamples, config.seqlen
    return TokenSequences(random_ids(*shape), turns(*shape))


def cut_all(_: Skeleton, config: PruneConfig) -> TokenSequences:
    """The same, and every token counts."""
    ids = random_ids(config.nsamples, config.seqlen)
    return TokenSequences(ids, torch.ones_like(ids, dtype=torch.bool))


def cut_none(_: Skeleton, config: PruneConfig) -> TokenSequences:
    """The same, and nothing is known of what counts."""
    return TokenSequences(random_ids(config.nsamples, config.seqlen))
