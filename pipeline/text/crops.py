"""Draws crops of tokens from the documents of a data set: which text is read is decided here.

Both ways of `pipeline.text.tokens` are here. What is drawn depends on the seed and the text alone,
not on the machine.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.text.chat import ChatRenderer, Tokens
from pipeline.text.columns import Conversation
from pipeline.text.documents import Document, TextFile
from pipeline.text.long_text import token_ids, token_stream

# Documents are drawn at random from a window of the stream. A larger window takes more memory.
WINDOW_DOCUMENTS = 10_000
WINDOW_CHARACTERS = 1 << 24
# Characters read per calibration token in the search for long documents (a token of English has
# about four characters). With too few long documents in that much text, documents count as short.
SEARCH_CHARACTERS = 256
# Bytes of text that a crop is drawn from, per token of the crop: of a longer document a part is
# drawn first, and a larger one where that has too few tokens.
BYTES_PER_TOKEN = (8, 32)
JOIN_TOKENS = 8  # tokens of joined text per calibration token, so that the crops can be random
# Documents after which the fewest bytes of a token that were seen tell which are too short.
_SEEN = 32
_WORD = 256  # characters at either end of a part of a text in which a space is looked for


class Encoder:
    """Turns conversations into tokens, and counts them."""

    def __init__(
        self, tokenizer: Any, before: tuple[int, ...], template: str | None, masked: bool
    ) -> None:
        """before: the tokens that every sequence gets, which a conversation then need not have.
        template, masked: as in `ChatRenderer`."""
        self.tokenizer, self._before = tokenizer, before
        self._template, self._masked = template, masked
        self.chat: ChatRenderer | None = None

    def conversation(self, conversation: Conversation) -> Tokens | None:
        """The tokens of a conversation; None if the template refuses it."""
        if self.chat is None:
            self.chat = ChatRenderer(self.tokenizer, self._template, masked=self._masked)
        tokens = self.chat.tokens(conversation)
        count = len(self._before)
        if tokens is not None and count and tuple(tokens[0][:count]) == self._before:
            return crop(tokens, count, len(tokens[0]))
        return tokens

    def restart(self) -> None:
        """Counts conversations anew."""
        self.chat = None


def document_crops(
    encoder: Encoder,
    documents: Iterable[Document],
    nsamples: int,
    length: int,
    generator: random.Random,
) -> list[Tokens] | None:
    """One random crop of `length` tokens from each of `nsamples` random long documents.

    None if there are too few of them in the text that is searched.
    """
    crops: list[Tokens] = []
    budget = SEARCH_CHARACTERS * nsamples * length
    fewest, seen = 1.0, 0  # bytes of a token: the fewest of a document, of how many documents
    for document in _shuffled(documents, generator):
        budget -= _size(document)
        tokens: Tokens | None = None
        if isinstance(document, Conversation):
            tokens = encoder.conversation(document)
        # A token has at least one byte, so most short documents need not be tokenized.
        elif _bytes(document) >= length * (fewest if seen >= _SEEN else 1.0):
            for size in BYTES_PER_TOKEN:
                text = _part(document, length * size, generator)
                ids = token_ids(encoder.tokenizer, text)
                if len(ids) >= length or _bytes(document) <= length * size:
                    break
            tokens = ids, None
            ratio = len(text.encode()) / max(1, len(ids))
            fewest, seen = min(fewest, ratio) if seen else ratio, seen + 1
        if tokens is not None and len(tokens[0]) >= length:
            start = generator.randrange(len(tokens[0]) - length + 1)
            crops.append(crop(tokens, start, length))
        if len(crops) == nsamples:
            return crops
        if budget < 0:
            break
    return None


def crop(tokens: Tokens, start: int, length: int) -> Tokens:
    """The tokens `start : start + length`."""
    ids, counted = tokens
    part = slice(start, start + length)
    return ids[part], None if counted is None else counted[part]


def _size(document: Document) -> int:
    """Characters of a document, at least 1, so that a stream of empty documents ends."""
    if isinstance(document, str):
        return max(1, len(document))
    if isinstance(document, Conversation):
        return max(1, sum(len(str(message["content"])) for message in document.messages))
    return 1


def _bytes(document: str | TextFile) -> float:
    if isinstance(document, str):
        return len(document.encode("utf-8"))
    return float("inf") if document.size is None else document.size


def _part(document: str | TextFile, size: int, generator: random.Random) -> str:
    """The document, or a random part of a longer one: of `size` characters, or bytes of a file."""
    if isinstance(document, str):
        if len(document) <= size:
            return document
        start = generator.randrange(len(document) - size + 1)
        stop = start + size
        return whole_words(document[start:stop], start > 0, stop < len(document))
    start = 0
    if document.size is not None and document.size > size:
        start = generator.randrange(document.size - size + 1)
    return read_part(document, start, size)


def read_part(file: TextFile, start: int, size: int) -> str:
    """The whole words in the bytes `start : start + size` of a text file."""
    ends = file.size is not None and start + size >= file.size
    return whole_words("".join(file.pieces(start, start + size)), start > 0, not ends)


def whole_words(text: str, cut_before: bool, cut_after: bool) -> str:
    """A part of a text without the words that are cut at its start and its end.

    The space before the first word stays: it is part of the word's token. Where no space is near
    (Chinese), nothing is left out.
    """
    if cut_after:
        end = text[-_WORD:]
        kept = next((n for n in range(len(end) - 1, -1, -1) if end[n].isspace()), len(end))
        text = text[: len(text) - len(end) + kept]
    if cut_before:
        text = text[next((n for n, letter in enumerate(text[:_WORD]) if letter.isspace()), 0) :]
    return text


def _shuffled(documents: Iterable[Document], generator: random.Random) -> Iterator[Document]:
    """The documents in random order, drawn from a window of bounded size over the stream."""
    window: list[Document] = []
    characters = 0
    for document in documents:
        window.append(document)
        characters += _size(document)
        while window and (len(window) > WINDOW_DOCUMENTS or characters > WINDOW_CHARACTERS):
            drawn = _draw(window, generator)
            characters -= _size(drawn)
            yield drawn
    while window:
        yield _draw(window, generator)


def _draw(window: list[Document], generator: random.Random) -> Document:
    index = generator.randrange(len(window))
    window[index], window[-1] = window[-1], window[index]
    return window.pop()


def file_crops(
    encoder: Encoder, file: TextFile, nsamples: int, length: int, generator: random.Random
) -> list[Tokens] | None:
    """Crops of `length` tokens from `nsamples` random parts, which do not overlap, of a large file.

    None for a file in which they do not fit, that is compressed, or a part of which has too few
    tokens: it is read from its start.
    """
    some, width = (size * length for size in BYTES_PER_TOKEN)
    if file.size is None or file.size < nsamples * width:
        return None
    crops = []
    for start in disjoint_starts(file.size, nsamples, width, generator):
        part = start + generator.randrange(width - some + 1)
        ids = token_ids(encoder.tokenizer, read_part(file, part, some))
        if len(ids) < length:
            ids = token_ids(encoder.tokenizer, read_part(file, start, width))
        if len(ids) < length:
            return None
        crops.append(crop((ids, None), generator.randrange(len(ids) - length + 1), length))
    return crops


def joined_tokens(
    encoder: Encoder, documents: Iterable[Document], needed: int, separator: str = "\n\n"
) -> Tokens:
    """The tokens of the joined documents, or, where they have more, `needed` of them or more.

    Texts are joined with `separator`; conversations, whose template ends them, with nothing.
    """
    ids: list[NDArray[np.int64]] = []
    counted: list[NDArray[np.bool_]] = []
    total = 0
    for part in _streams(encoder, documents, needed, separator):
        ids.append(part[0])
        if part[1] is not None:
            counted.append(part[1])
        total += len(part[0])
        if total >= needed:
            break
    joined = np.concatenate([np.zeros(0, dtype=np.int64), *ids])
    whole = counted and sum(map(len, counted)) == total
    return joined, np.concatenate(counted) if whole else None


def _streams(
    encoder: Encoder, documents: Iterable[Document], needed: int, separator: str
) -> Iterator[Tokens]:
    for are_chats, group in itertools.groupby(
        documents, key=lambda document: isinstance(document, Conversation)
    ):
        if are_chats:
            for document in group:
                assert isinstance(document, Conversation)
                if (tokens := encoder.conversation(document)) is not None:
                    yield tokens
        else:
            for ids in token_stream(encoder.tokenizer, _joined(group, separator), needed):
                yield ids, None


def _joined(documents: Iterable[Document], separator: str) -> Iterator[str]:
    for index, document in enumerate(documents):
        if index:
            yield separator
        if isinstance(document, TextFile):
            yield from document.pieces()
        else:
            assert isinstance(document, str)
            yield document


def disjoint_starts(length: int, nsamples: int, seqlen: int, generator: random.Random) -> list[int]:
    """Starts of `nsamples` crops of `seqlen` tokens in `length` tokens that do not overlap.

    In random order. The unused tokens are divided at random over the gaps: sorted draws from
    0..slack, one per crop.
    """
    slack = length - nsamples * seqlen
    gaps = sorted(generator.randrange(slack + 1) for _ in range(nsamples))
    starts = [gap + index * seqlen for index, gap in enumerate(gaps)]
    generator.shuffle(starts)
    return starts
