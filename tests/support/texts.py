"""Sequences of a text, as the options' defaults cut them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipeline.config.text import TextOptions
from pipeline.text import tokens


def calibration_ids(
    tokenizer: Any, dataset: str, column: str | None, nsamples: int, seqlen: int, seed: int
) -> Tensor:
    """The calibration sequences, (nsamples, seqlen) int64."""
    options = TextOptions(text_column=column)
    return tokens.calibration_tokens(tokenizer, dataset, options, nsamples, seqlen, seed).ids


def evaluation_ids(
    tokenizer: Any,
    dataset: str,
    column: str | None,
    seqlen: int,
    nsamples: int | None = None,
    revision: str | None = None,
) -> Tensor:
    """The evaluation sequences, (n, seqlen) int64."""
    options = TextOptions(text_column=column)
    return tokens.evaluation_tokens(tokenizer, dataset, options, seqlen, nsamples, revision).ids
