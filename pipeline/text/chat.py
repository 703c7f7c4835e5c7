"""Conversations as tokens, rendered by the tokenizer's chat template, with the spans of answers.

Which tokens are the assistant's: where the template marks them (`{% generation %}`), as it says.
Otherwise by rendering the conversation up to each answer, with the prompt for it, and up to its
end: what the answer adds, which includes the token that ends the turn, as the model generates it.
A template that renders earlier answers otherwise than the last one (Qwen3 leaves out their
reasoning) is searched for the answer's text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.text.columns import Conversation
from pipeline.text.files import unreadable
from pipeline.text.long_text import token_ids, tokens_and_places
from storage.errors import ConfigError, DataError, first_line

Tokens = tuple[NDArray[np.int64], NDArray[np.bool_] | None]
"""Token ids (n,), and which of them are counted, (n,); None for all of them."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MAX_TEMPLATE_BYTES = 1 << 20


class Refused(Exception):
    """A conversation that the template does not take, with its reason."""


def read_template(path: str) -> str:
    """The chat template in a file. Raises ConfigError, naming the file, if it cannot be read."""
    file = Path(path)
    try:
        if file.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise ConfigError(f"--chat-template {file} is larger than 1 MiB: name a Jinja template")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--chat-template: {unreadable(file, error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--chat-template {file} is not UTF-8: {error}") from error
    if not text.strip():
        raise ConfigError(f"--chat-template {file} is empty: name a Jinja template")
    return text


class ChatRenderer:
    """Renders and tokenizes conversations. Counts those that the template refuses."""

    def __init__(self, tokenizer: Any, template: str | None, *, masked: bool) -> None:
        """template: in place of the tokenizer's own. masked: whether answers are marked.

        Raises DataError if there is no template.
        """
        own = getattr(tokenizer, "chat_template", None)
        if not (template or own):
            raise DataError(
                "the text is conversations, and the model's tokenizer has no chat template to "
                "render them with: give one with --chat-template FILE (a Jinja template), or plain "
                "text with --text-column"
            )
        self._tokenizer, self._template, self._masked = tokenizer, template, masked
        text = template or (own if isinstance(own, str) else "")
        # transformers finds marked tokens by their characters, which only fast tokenizers tell.
        fast = getattr(tokenizer, "is_fast", False)
        self._marks = fast and _GENERATION.search(text) is not None
        self.rendered, self.refused = 0, 0
        self.first_refusal = ""

    def tokens(self, conversation: Conversation) -> Tokens | None:
        """The conversation's tokens; None if the template refuses it, which is counted."""
        try:
            result = self._tokens(list(conversation.messages))
        except Refused as reason:
            self.refused += 1
            self.first_refusal = self.first_refusal or f"{conversation.place}: {reason}"
            return None
        self.rendered += 1
        return result

    def _tokens(self, messages: list[dict[str, Any]]) -> Tokens:
        if not self._masked:
            return token_ids(self._tokenizer, self._render(messages)), None
        if self._marks:
            return self._marked(messages)
        text = self._render(messages)
        spans = self._spans(messages, text)
        if not spans:
            raise Refused("it has no answer of the assistant")
        return _encoded_with_spans(self._tokenizer, text, spans)

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, **options
            )
        except Exception as error:  # a template raises whatever it likes
            raise Refused(f"the chat template refuses it: {first_line(error)}") from error
        return str(text)

    def _marked(self, messages: list[dict[str, Any]]) -> Tokens:
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
        except Exception as error:
            raise Refused(f"the chat template refuses it: {first_line(error)}") from error
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        return np.asarray(ids, dtype=np.int64), np.asarray(mask, dtype=np.bool_)

    def _spans(self, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        """Where the assistant's answers are in the rendered text, in characters."""
        spans: list[tuple[int, int]] = []
        done = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            span = self._added(messages, index, text, done) or _found(message, text, done)
            if span is None:
                raise Refused("its template changes the assistant's answers beyond recognition")
            spans.append(span)
            done = span[1]
        return spans

    def _added(
        self, messages: list[dict[str, Any]], index: int, text: str, done: int
    ) -> tuple[int, int] | None:
        """What message `index` adds to the prompt for it; None if that is not in `text`."""
        try:
            before = self._render(messages[:index], add_generation_prompt=True) if index else ""
            through = self._render(messages[: index + 1])
        except Refused:  # a template may want a whole conversation
            return None
        if not index or not text.startswith(before) or len(before) < done:
            return None
        end = _common(text, through)
        stop = len(before) + len(text[len(before) : end].rstrip())
        whole = message_text(messages[index])
        if stop <= len(before) or whole not in text[len(before) : stop]:
            return None
        return len(before), stop


def message_text(message: dict[str, Any]) -> str:
    """A message's text without what templates add or strip at its ends."""
    return str(message.get("content") or "").strip()


def _common(a: str, b: str) -> int:
    """Number of characters that two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def _found(message: dict[str, Any], text: str, done: int) -> tuple[int, int] | None:
    """Where a message's text is in the rendered text, after `done`."""
    whole = message_text(message)
    for part in (whole, whole.rpartition("</think>")[2].strip()):
        at = text.find(part, done) if part else -1
        if at >= 0:
            return at, at + len(part)
    return None


def _encoded_with_spans(
    tokenizer: Any, text: str, spans: list[tuple[int, int]]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Token ids, and which of them have a character in one of the spans."""
    if getattr(tokenizer, "is_fast", False):
        ids, places = tokens_and_places(tokenizer, text)
        mask = np.zeros(len(ids), dtype=np.bool_)
        for start, stop in spans:
            mask |= (places[:, 0] < stop) & (places[:, 1] > start)
        return ids, mask
    # A tokenizer in Python does not tell positions: as in generation, prompt and answer are apart.
    parts: list[tuple[NDArray[np.int64], bool]] = []
    at = 0
    for start, stop in [*spans, (len(text), len(text))]:
        parts += [(token_ids(tokenizer, text[at:start]), False)]
        parts += [(token_ids(tokenizer, text[start:stop]), True)]
        at = stop
    ids = np.concatenate([part for part, _ in parts])
    return ids, np.concatenate([np.full(len(part), answer) for part, answer in parts])
