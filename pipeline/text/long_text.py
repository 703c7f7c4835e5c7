"""Tokenizes a text of any length a piece at a time: the tokens of the whole, at a bounded memory.

Fast tokenizers need hundreds of bytes of memory for a character. So a text is tokenized in pieces
that overlap, and two neighbours are joined at a place in the overlap around which their tokens
agree: what a tokenizer merges reaches no further than a few words, so that both give the tokens of
the whole text there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

PIECE = 1 << 17  # characters that are tokenized at a time, at most
_OVERLAP = 1 << 13  # characters that two pieces have in common
# Tokens on each side of a joint that must be the same in both pieces. The smaller numbers are for
# overlaps of few tokens; without any, the joint is where the second piece starts.
_AGREE = (24, 8, 2)
_CHARACTERS = 8  # of a token, about twice as many as in English


@dataclass(frozen=True)
class _Tokens:
    """Tokens in order. starts, stops: each one's characters, counted from the text's start."""

    ids: Ids
    starts: Ids
    stops: Ids

    def part(self, start: int, stop: int | None = None) -> _Tokens:
        """The tokens `start:stop`."""
        where = slice(start, stop)
        return _Tokens(self.ids[where], self.starts[where], self.stops[where])

    def joints(self) -> NDArray[np.bool_]:
        """Which tokens start where the one before ends: no character is in two of them."""
        first = np.ones(min(1, len(self.ids)), dtype=np.bool_)
        return np.concatenate([first, self.stops[:-1] <= self.starts[1:]])


def token_ids(tokenizer: Any, text: str) -> Ids:
    """The tokens of a text, without special tokens around it: (n,) int64."""
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return np.asarray(ids.input_ids, dtype=np.int64)


def token_stream(tokenizer: Any, texts: Iterable[str], needed: int) -> Iterator[Ids]:
    """The tokens of the texts joined, without special tokens, in parts (n,) int64.

    needed: how many will be taken, about; the pieces are as long as that, at most `PIECE`. Reads in
    `texts` no more than a piece beyond the tokens that are taken. A tokenizer written in
    Python does not tell the characters of its tokens, and gets the whole text at once.
    """
    if not getattr(tokenizer, "is_fast", False):
        yield token_ids(tokenizer, "".join(texts))
        return
    overlap: _Tokens | None = None
    size = min(PIECE, max(2 * _OVERLAP, _CHARACTERS * needed))
    for origin, piece, last in _pieces(texts, size):
        tokens = _encode(tokenizer, piece, origin)
        before = tokens.ids[:0]
        if overlap is not None:
            left, right = _joint(overlap, tokens)
            before, tokens = overlap.ids[:left], tokens.part(right)
        kept = len(tokens.ids)
        if not last:
            # What is in the next piece as well; it starts where the overlap does.
            kept = int(np.searchsorted(tokens.starts, origin + len(piece) - _OVERLAP))
        yield np.concatenate([before, tokens.ids[:kept]])
        overlap = tokens.part(kept)


def _pieces(texts: Iterable[str], length: int) -> Iterator[tuple[int, str, bool]]:
    """Pieces of `length` that overlap: (first character, text, whether it is the last)."""
    origin, text = 0, ""
    pending: list[str] = []
    size = 0
    for part in texts:
        pending.append(part)
        size += len(part)
        if len(text) + size <= length:
            continue
        text, pending, size = text + "".join(pending), [], 0
        at = 0
        while len(text) - at > length:
            yield origin + at, text[at : at + length], False
            at += length - _OVERLAP
        origin, text = origin + at, text[at:]
    yield origin, text + "".join(pending), True


def tokens_and_places(tokenizer: Any, text: str) -> tuple[Ids, Ids]:
    """As `token_ids`, and each token's first and last + 1 character, (n, 2) int64.

    Of a fast tokenizer: one that is written in Python does not tell them.
    """
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    places = np.asarray(encoded.offset_mapping, dtype=np.int64).reshape(-1, 2)
    return np.asarray(encoded.input_ids, dtype=np.int64), places


def _encode(tokenizer: Any, text: str, origin: int) -> _Tokens:
    ids, places = tokens_and_places(tokenizer, text)
    return _Tokens(ids, places[:, 0] + origin, places[:, 1] + origin)


def _joint(left: _Tokens, right: _Tokens) -> tuple[int, int]:
    """Where two neighbours meet: `left[:i]` and `right[j:]` together are the tokens of both.

    Of the places around which their tokens agree, the one nearest to the middle of `left`.
    """
    of_right = {int(right.starts[j]): int(j) for j in np.flatnonzero(right.joints())}
    places = [
        (int(i), of_right[int(left.starts[i])])
        for i in np.flatnonzero(left.joints())
        if int(left.starts[i]) in of_right
    ]
    places.sort(key=lambda place: (abs(place[0] - len(left.ids) // 2), place))
    for agree in _AGREE:
        for i, j in places:
            if _agree(left, right, i, j, agree):
                return i, j
    # The second piece starts with the overlap: what is before it comes from the first.
    start = int(right.starts[0]) if len(right.ids) else 0
    return int(np.searchsorted(left.starts, start)), 0


def _agree(left: _Tokens, right: _Tokens, i: int, j: int, count: int) -> bool:
    if min(i, j) < count or len(left.ids) - i < count or len(right.ids) - j < count:
        return False
    a, b = left.part(i - count, i + count), right.part(j - count, j + count)
    return np.array_equal(a.ids, b.ids) and np.array_equal(a.starts, b.starts)
