"""Calibration and evaluation texts as tokens, by the conventions of the field.

Evaluation: the documents are joined with blank lines, tokenized once and cut into sequences of
seqlen tokens; the rest is dropped. This is the perplexity of GPTQ (arXiv:2210.17323), SparseGPT
(arXiv:2301.00774) and Wanda (arXiv:2306.11695). C4 is too large for that: as in the same papers,
the first 1,100 documents of its validation split are joined with spaces, and the first 256
sequences are taken.

Calibration: `nsamples` sequences of seqlen tokens, drawn at random in one of three ways.
1. Many documents (C4): documents of at least seqlen tokens are drawn at random. Each gives one
   random crop, so that no sequence crosses documents.
2. One large text file: crops of parts of it that do not overlap, drawn at random.
3. Otherwise (a small text, or short documents): the documents are joined with blank lines and
   tokenized. The sequences are random crops that do not overlap, so nsamples × seqlen tokens
   suffice. At most 8 times as many are read.
All read no more than they need, so a data set larger than memory or disk can be streamed. All are
deterministic in the seed, and none uses a global random generator.

Every sequence, of either kind, starts with the tokens that the tokenizer puts before a text (BOS),
and counts them in its seqlen (see `tokenizer.tokens_before`). Conversations are rendered by the
chat template (see `pipeline.text.chat`).
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.config.text import TextOptions
from pipeline.text.chat import Tokens, read_template
from pipeline.text.crops import (
    JOIN_TOKENS,
    Encoder,
    crop,
    disjoint_starts,
    document_crops,
    file_crops,
    joined_tokens,
)
from pipeline.text.documents import Documents, read_documents
from pipeline.text.odd_text import oddity
from pipeline.text.sequences import TokenSequences
from pipeline.text.tokenizer import Tokenizer, describe_bos, tokens_before
from storage.errors import ConfigError, DataError

CALIBRATION_SPLITS = ("train",)
EVALUATION_SPLITS = ("test", "validation", "train")
_SHOWN_SEQUENCES, _SHOWN_TOKENS = 16, 512  # that are decoded to see whether they are text


@dataclass(frozen=True)
class Convention:
    """How an evaluation text is cut into sequences.

    separator: between documents. documents, nsamples: maximum numbers of documents and sequences,
    from the start; None for all.
    """

    separator: str = "\n\n"
    documents: int | None = None
    nsamples: int | None = None


C4_CONVENTION = Convention(separator=" ", documents=1100, nsamples=256)
CONVENTIONS = {"allenai/c4": C4_CONVENTION, "allenai/c4:en": C4_CONVENTION}


class _Cutter:
    """Cuts sequences of one text for one tokenizer."""

    def __init__(
        self, tokenizer: Tokenizer, dataset: str, options: TextOptions, seqlen: int, masked: bool
    ) -> None:
        self.dataset, self.tokenizer = dataset, tokenizer
        self.before = tokens_before(tokenizer, options.bos)
        self.length = seqlen - len(self.before)  # tokens of text in a sequence
        if self.length < 1:
            raise ConfigError(
                f"--seqlen {seqlen} leaves no room beside the {len(self.before)} tokens that the "
                "tokenizer puts before a text: raise it"
            )
        template = None if options.chat_template is None else read_template(options.chat_template)
        self.encoder = Encoder(tokenizer, self.before, template, masked)

    def require(self, tokens: Tokens, needed: int, in_words: str) -> None:
        """Raises DataError where there are fewer than `needed` tokens of text."""
        if len(tokens[0]) < needed:
            self._require_some_chat()
            raise DataError(
                f"{self.dataset} holds {len(tokens[0])} tokens, fewer than {in_words}: give more "
                "text, or lower --nsamples or --seqlen"
            )

    def _require_some_chat(self) -> None:
        chat = self.encoder.chat
        if chat is not None and not chat.rendered:
            raise DataError(
                f"{self.dataset}: no conversation could be used; {chat.first_refusal}: mend the "
                "data, or give another --chat-template"
            )

    def sequences(self, crops: Sequence[Tokens], documents: Documents, cut: str) -> TokenSequences:
        """The crops with what stands before each, and what was read. cut: how, in words."""
        ids, counted = zip(*(self._with_before(each) for each in crops), strict=True)
        masked = all(mask is not None for mask in counted)
        mask = torch.from_numpy(np.stack(counted)) if masked else None
        described = documents.describe() | {"sequences": cut}
        if (chat := self.encoder.chat) is not None:
            described |= {"conversations": chat.rendered}
            if chat.refused:
                described |= {"refused": chat.refused, "first_refusal": chat.first_refusal}
        described["bos"] = describe_bos(self.tokenizer, self.before)
        if (odd := oddity(self._shown(crops))) is not None:
            described["note"] = odd
        return TokenSequences(torch.from_numpy(np.stack(ids)), mask, described)

    def _with_before(self, tokens: Tokens) -> Tokens:
        ids, counted = tokens
        first = np.array(self.before, dtype=np.int64)
        if counted is not None:
            counted = np.concatenate([np.zeros(len(first), dtype=np.bool_), counted])
        return np.concatenate([first, ids]), counted

    def _shown(self, crops: Sequence[Tokens]) -> str:
        decode: Any = self.tokenizer
        shown = [ids[:_SHOWN_TOKENS].tolist() for ids, _ in crops[:_SHOWN_SEQUENCES]]
        return "\n".join(str(decode.decode(ids, skip_special_tokens=True)) for ids in shown)


def calibration_tokens(
    tokenizer: Tokenizer,
    dataset: str,
    options: TextOptions,
    nsamples: int,
    seqlen: int,
    seed: int,
    *,
    masked: bool = False,
) -> TokenSequences:
    """Draw the calibration sequences, (nsamples, seqlen), as at the top of this file.

    masked: whether the tokens of the assistant's answers in conversations are counted alone.

    Raises DataError as `Documents`, and if the data set has fewer than nsamples × seqlen tokens.
    """
    cutter = _Cutter(tokenizer, dataset, options, seqlen, masked)
    length, encoder = cutter.length, cutter.encoder

    def documents() -> Documents:
        return read_documents(dataset, options.text_column, splits=CALIBRATION_SPLITS)

    read = documents()
    if (file := read.one_text()) is not None:
        next(iter(read))  # refuses what is not plain text, and counts the file
        crops = file_crops(encoder, file, nsamples, length, random.Random(seed))
        if crops is not None:
            return cutter.sequences(crops, read, "crops of random parts of one text")
    else:
        crops = document_crops(encoder, read, nsamples, length, random.Random(seed))
        if crops is not None:
            return cutter.sequences(crops, read, "a crop of each of as many long documents")
    read, needed = documents(), nsamples * length
    encoder.restart()
    tokens = joined_tokens(encoder, read, JOIN_TOKENS * needed)
    cutter.require(tokens, needed, f"{nsamples} × {length} = {needed}")
    starts = disjoint_starts(len(tokens[0]), nsamples, length, random.Random(seed))
    crops = [crop(tokens, start, length) for start in starts]
    return cutter.sequences(crops, read, "crops of the joined text")


def evaluation_tokens(
    tokenizer: Tokenizer,
    dataset: str,
    options: TextOptions,
    seqlen: int,
    nsamples: int | None = None,
    revision: str | None = None,
) -> TokenSequences:
    """Cut the evaluation text into (n, seqlen): the first `nsamples` sequences, or all.

    A hub data set is read at the commit `revision` (None: the newest), in the first of the splits
    test, validation, train that it has; C4 as at the top of this file. With `nsamples`, only the
    needed part of the text is read.

    Raises DataError as `Documents`, and if the text has fewer than nsamples × seqlen tokens, or
    fewer than seqlen.
    """
    cutter = _Cutter(tokenizer, dataset, options, seqlen, masked=False)
    read = read_documents(dataset, options.text_column, splits=EVALUATION_SPLITS, revision=revision)
    convention, length = CONVENTIONS.get(dataset, Convention()), cutter.length
    documents = itertools.islice(read, convention.documents)
    most = nsamples or convention.nsamples
    needed = sys.maxsize if most is None else most * length
    tokens = joined_tokens(cutter.encoder, documents, needed, convention.separator)
    if nsamples is not None:
        cutter.require(tokens, needed, f"{nsamples} × {length} = {needed}")
    cutter.require(tokens, length, f"one sequence of {length}")
    count = min(len(tokens[0]) // length, most or sys.maxsize)
    crops = [crop(tokens, index * length, length) for index in range(count)]
    return cutter.sequences(crops, read, "the joined text in order")
