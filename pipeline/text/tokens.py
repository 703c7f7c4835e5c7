"""Calibration and evaluation texts as tokens, by the conventions of the field.

Evaluation: the documents are joined with blank lines, tokenized once and cut into sequences of
seqlen tokens; the rest is dropped. This is the perplexity of GPTQ (arXiv:2210.17323), SparseGPT
(arXiv:2301.00774) and Wanda (arXiv:2306.11695). C4 is too large for that: as in the same papers,
the first 1,100 documents of its validation split are joined with spaces, and the first 256
sequences are taken.

Calibration: `nsamples` sequences of seqlen tokens, drawn at random in one of two ways.
1. Many documents (C4): documents of at least seqlen tokens are drawn at random. Each gives one
   random crop, so that no sequence crosses documents.
2. Otherwise (one text, or short documents): the documents are joined with blank lines and tokenized
   once. The sequences are random crops that do not overlap, so nsamples × seqlen tokens suffice.
Both read no more than they need, so a data set larger than memory or disk can be streamed. Both
are deterministic in the seed, and neither uses a global random generator.

Special tokens are those that the tokenizer adds by itself, once per tokenized text.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer

from pipeline.text.documents import read_documents
from storage.errors import DataError, ModelError
from storage.files.names import by_utf8_name

# Documents are drawn at random from a window of the stream. A larger window takes more memory.
WINDOW_DOCUMENTS = 10_000
WINDOW_CHARACTERS = 1 << 26
# Characters read per calibration token in the search for long documents (a token of English has
# about four characters). With too few long documents in that much text, documents count as short.
SEARCH_CHARACTERS = 256
# Characters of joined text per calibration token, so that the crops have room to be random.
JOIN_CHARACTERS = 32

# What transformers reads sentencepiece models with: module -> package.
_OF_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}

CALIBRATION_SPLITS = ("train",)
EVALUATION_SPLITS = ("test", "validation", "train")


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


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def __call__(self, text: str, **options: Any) -> Any:
        """Return an object whose `input_ids` is a list of int."""
        ...


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer saved in a model folder. ModelError if there is none or it does not load."""
    try:
        with by_utf8_name(folder) as readable:
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
                readable, trust_remote_code=trust_remote_code, local_files_only=True
            )
        usable = bool(tokenizer("a b").input_ids)
    except Exception as error:  # transformers raises nearly anything on a damaged file
        raise ModelError(_why_no_tokenizer(folder, error)) from error
    if not usable:
        raise ModelError(f"the tokenizer in {folder} is empty: copy the tokenizer files into it")
    return tokenizer


def _why_no_tokenizer(folder: Path, error: Exception) -> str:
    """Why a tokenizer does not load, and what to do."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            f"the tokenizer in {folder} comes with its own code (`auto_map`), which prox24 runs "
            "only with --trust-remote-code; read the code before you give it"
        )
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    missing = [name for name in _OF_SENTENCEPIECE if not is_installed(name)]
    if any(folder.glob("*.model")) and missing:
        # What transformers says here is of the last thing that it tried.
        packages = " ".join(_OF_SENTENCEPIECE[name] for name in missing)
        return f"the tokenizer in {folder} is a sentencepiece model: pip install {packages}"
    asked = re.search(r"pip install (?:-U )?([\w.\[\]-]+)", text)
    if asked:
        install = f"pip install {asked[1].rstrip('.')}"
        return (
            f"the tokenizer in {folder} does not load ({first}): {install}, or copy the tokenizer "
            "files of the model into it if they are damaged"
        )
    return (
        f"{folder} has no tokenizer that loads ({first}): copy the tokenizer files of the model "
        "into it"
    )


def is_installed(module: str) -> bool:
    """Whether a module could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as a result records it: its `class`, and the number of its `tokens`."""
    return {"class": type(tokenizer).__name__, "tokens": len(tokenizer)}


def calibration_tokens(
    tokenizer: Tokenizer,
    dataset: str,
    text_column: str | None,
    nsamples: int,
    seqlen: int,
    seed: int,
) -> torch.Tensor:
    """Draw the calibration sequences, (nsamples, seqlen) int64, as at the top of this file.

    Raises DataError as `read_documents`, and if the data set has fewer than nsamples × seqlen
    tokens.
    """
    needed = nsamples * seqlen
    documents = read_documents(dataset, text_column, splits=CALIBRATION_SPLITS)
    crops = _document_crops(tokenizer, documents, nsamples, seqlen, random.Random(seed))
    if crops is not None:
        return torch.tensor(crops, dtype=torch.int64)
    documents = read_documents(dataset, text_column, splits=CALIBRATION_SPLITS)
    ids = _joined_tokens(tokenizer, documents, needed)
    if len(ids) < needed:
        raise _too_short(dataset, len(ids), f"{nsamples} × {seqlen} = {needed}")
    starts = _disjoint_starts(len(ids), nsamples, seqlen, random.Random(seed))
    return torch.tensor([ids[start : start + seqlen] for start in starts], dtype=torch.int64)


def evaluation_tokens(
    tokenizer: Tokenizer,
    dataset: str,
    text_column: str | None,
    seqlen: int,
    nsamples: int | None = None,
    revision: str | None = None,
) -> torch.Tensor:
    """Cut the evaluation text into (n, seqlen) int64: the first `nsamples` sequences, or all.

    A hub data set is read at the commit `revision` (None: the newest), in the first of the splits
    test, validation, train that it has; C4 as at the top of this file. With `nsamples`, only the
    needed part of the text is read.

    Raises DataError as `read_documents`, and if the text has fewer than nsamples × seqlen tokens,
    or fewer than seqlen.
    """
    documents = read_documents(dataset, text_column, splits=EVALUATION_SPLITS, revision=revision)
    convention = CONVENTIONS.get(dataset, Convention())
    documents = itertools.islice(documents, convention.documents)
    if nsamples is None:
        ids = _token_ids(tokenizer, convention.separator.join(documents))
        nsamples = len(ids) // seqlen
        if nsamples == 0:
            raise _too_short(dataset, len(ids), f"one sequence of {seqlen}")
        nsamples = min(nsamples, convention.nsamples or nsamples)
    else:
        ids = _joined_tokens(tokenizer, documents, nsamples * seqlen, convention.separator)
        if len(ids) < nsamples * seqlen:
            raise _too_short(dataset, len(ids), f"{nsamples} × {seqlen} = {nsamples * seqlen}")
    return torch.tensor(ids[: nsamples * seqlen], dtype=torch.int64).reshape(nsamples, seqlen)


def _too_short(dataset: str, tokens: int, needed: str) -> DataError:
    return DataError(
        f"{dataset} holds {tokens} tokens, fewer than {needed}: give more text, "
        "or lower --nsamples or --seqlen"
    )


def _token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    # verbose=False: no warning about a text longer than the model's maximum, which is intended.
    ids: list[int] = tokenizer(text, return_attention_mask=False, verbose=False).input_ids
    return ids


def _document_crops(
    tokenizer: Tokenizer,
    documents: Iterable[str],
    nsamples: int,
    seqlen: int,
    generator: random.Random,
) -> list[list[int]] | None:
    """One random crop of each of `nsamples` random long documents; None if there are too few."""
    crops: list[list[int]] = []
    budget = SEARCH_CHARACTERS * nsamples * seqlen
    for document in _shuffled(documents, generator):
        budget -= max(1, len(document))  # at least 1, so that a stream of empty documents ends
        # A token has at least one byte, so most short documents need not be tokenized.
        if len(document.encode("utf-8")) >= seqlen:
            ids = _token_ids(tokenizer, document)
            if len(ids) >= seqlen:
                start = generator.randrange(len(ids) - seqlen + 1)
                crops.append(ids[start : start + seqlen])
        if len(crops) == nsamples:
            return crops
        if budget < 0:
            break
    return None


def _shuffled(documents: Iterable[str], generator: random.Random) -> Iterator[str]:
    """The documents in random order, drawn from a window of bounded size over the stream."""
    window: list[str] = []
    characters = 0
    for document in documents:
        window.append(document)
        characters += len(document)
        while window and (len(window) > WINDOW_DOCUMENTS or characters > WINDOW_CHARACTERS):
            drawn = _draw(window, generator)
            characters -= len(drawn)
            yield drawn
    while window:
        yield _draw(window, generator)


def _draw(window: list[str], generator: random.Random) -> str:
    index = generator.randrange(len(window))
    window[index], window[-1] = window[-1], window[index]
    return window.pop()


def _joined_tokens(
    tokenizer: Tokenizer, documents: Iterable[str], needed: int, separator: str = "\n\n"
) -> list[int]:
    """Tokens of the joined documents, or of a prefix with at least 2 · `needed` tokens.

    A prefix ends between documents. It is this long so that its first `needed` tokens are those of
    the whole text.
    """
    stream = iter(documents)
    read: list[str] = []
    limit = JOIN_CHARACTERS * needed
    while True:
        characters = sum(map(len, read))
        exhausted = True
        for document in stream:
            read.append(document)
            characters += len(document)
            if max(characters, len(read)) >= limit:
                exhausted = False
                break
        ids = _token_ids(tokenizer, separator.join(read))
        if exhausted or len(ids) >= 2 * needed:
            return ids
        limit = 4 * max(characters, len(read))


def _disjoint_starts(
    length: int, nsamples: int, seqlen: int, generator: random.Random
) -> list[int]:
    """Starts of `nsamples` crops of `seqlen` tokens in `length` tokens that do not overlap.

    In random order. The unused tokens are divided at random over the gaps: sorted draws from
    0..slack, one per crop.
    """
    slack = length - nsamples * seqlen
    gaps = sorted(generator.randrange(slack + 1) for _ in range(nsamples))
    starts = [gap + index * seqlen for index, gap in enumerate(gaps)]
    generator.shuffle(starts)
    return starts
