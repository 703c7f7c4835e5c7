"""Conversations: every published form, rendered as transformers renders it, and whose tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.text import TextOptions
from pipeline.text.chat import ChatRenderer
from pipeline.text.columns import Conversation
from pipeline.text.tokens import calibration_tokens, evaluation_tokens
from storage.errors import ConfigError, DataError
from tests.support.chat_models import CHATML, GEMMA, MARKED, REASONING, chat_tokenizer

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": " four \n"},
    {"role": "user", "content": "four?"},
    {"role": "assistant", "content": "yes, four.\n\nReally: four"},
]
TURNS = CHAT[1:]


def conversation(messages: list[dict[str, Any]]) -> Conversation:
    return Conversation(tuple(messages), "row 1")


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def counted_text(tokenizer: Any, ids: Any, counted: Any) -> list[str]:
    """The texts of the runs of counted tokens."""
    runs: list[list[int]] = []
    before = False
    for token, counts in zip(ids.tolist(), counted.tolist(), strict=True):
        if counts:
            runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
        before = counts
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("messages", [CHAT, TURNS, TURNS[:2]])
def test_the_answers_are_those_that_transformers_marks(messages: list[dict[str, Any]]) -> None:
    tokenizer = chat_tokenizer(MARKED)
    expected = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    spaced = MARKED.replace("{%- generation -%}", "{%-  generation%}")
    for template in (CHATML, MARKED, spaced):
        renderer = ChatRenderer(chat_tokenizer(template), None, masked=True)
        tokens = renderer.tokens(conversation(messages))
        assert tokens is not None
        assert tokens[0].tolist() == expected["input_ids"]
        assert tokens[1] is not None
        assert tokens[1].tolist() == [bool(mark) for mark in expected["assistant_masks"]]


def test_a_real_chat_template(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    renderer = ChatRenderer(tokenizer, None, masked=True)
    tokens = renderer.tokens(conversation(TURNS))
    assert tokens is not None
    assert tokens[1] is not None
    assert tokenizer.decode(tokens[0]) == tokenizer.apply_chat_template(TURNS, tokenize=False)
    answers = counted_text(tokenizer, *tokens)
    assert [answer.removesuffix("<|im_end|>").strip() for answer in answers] == [
        message["content"].strip() for message in TURNS if message["role"] == "assistant"
    ]
    assert all(answer.endswith("<|im_end|>") for answer in answers)


def test_answers_whose_reasoning_the_template_leaves_out() -> None:
    messages = [dict(message) for message in TURNS]
    for message in messages:
        if message["role"] == "assistant":
            message["content"] = "<think>\nhm\n</think>\n\n" + message["content"].strip()
    tokenizer = chat_tokenizer(REASONING)
    tokens = ChatRenderer(tokenizer, None, masked=True).tokens(conversation(messages))
    assert tokens is not None
    assert tokens[1] is not None
    first, last = counted_text(tokenizer, *tokens)
    assert first.removesuffix("<|im_end|>") == "four"
    assert last == messages[-1]["content"] + "<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_tokenizer_in_python_marks_the_same_answers(template: str) -> None:
    class Slow:
        """The tokenizer without the interface that tells characters."""

        is_fast = False
        chat_template = template

        def __init__(self) -> None:
            self.inner = chat_tokenizer(template)

        def __call__(self, text: str, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return self.inner(text, **options)

        def apply_chat_template(self, *args: Any, **options: Any) -> Any:
            return self.inner.apply_chat_template(*args, **options)

    slow = ChatRenderer(Slow(), None, masked=True).tokens(conversation(CHAT))
    fast = ChatRenderer(chat_tokenizer(), None, masked=True).tokens(conversation(CHAT))
    assert slow is not None
    assert fast is not None
    assert slow[0].tolist() == fast[0].tolist()
    assert slow[1] is not None
    assert fast[1] is not None
    assert slow[1].tolist() == fast[1].tolist()


def as_sharegpt(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[each["role"]], "value": each["content"]} for each in messages]


ONE = [{"role": "user", "content": "ask me"}, {"role": "assistant", "content": "an answer"}]
FORMS: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    ("messages", {"id": "a1", "messages": CHAT}, CHAT),
    ("ShareGPT", {"id": "a1", "conversations": as_sharegpt(CHAT)}, CHAT),
    ("ShareGPT with roles", {"id": "x", "conversations": CHAT}, CHAT),
    ("prompt and response", {"prompt": "ask me", "response": "an answer", "score": 1}, ONE),
    ("prompt and completion", {"prompt": "ask me", "completion": "an answer"}, ONE),
    ("messages in both", {"prompt": ONE[:1], "completion": ONE[1:]}, ONE),
    ("Alpaca", {"instruction": "ask me", "input": "", "output": "an answer"}, ONE),
    (
        "Alpaca with input",
        {"instruction": "ask me", "input": "this", "output": "an answer"},
        [{"role": "user", "content": "ask me\n\nthis"}, ONE[1]],
    ),
    (
        "parts of text",
        {
            "messages": [
                {**each, "content": [{"type": "text", "text": each["content"]}]} for each in ONE
            ]
        },
        ONE,
    ),
]


@pytest.mark.parametrize(("name", "row", "messages"), FORMS, ids=[form[0] for form in FORMS])
@pytest.mark.parametrize("masked", [False, True])
def test_published_forms_of_conversations(
    tmp_path: Path, name: str, row: dict[str, Any], messages: list[dict[str, Any]], masked: bool
) -> None:
    tokenizer = chat_tokenizer()
    path = lines(tmp_path / "d.jsonl", [row] * 8)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text).input_ids
    tokens = calibration_tokens(
        tokenizer, path, TextOptions(), 1, 8 * len(ids), seed=0, masked=masked
    )
    assert tokens.ids[0].tolist() == ids * 8
    assert tokens.text["read"].startswith("conversations in `")
    assert tokens.text["conversations"] == 8
    assert (tokens.counted is not None) == masked
    if tokens.counted is not None:
        answers = counted_text(tokenizer, tokens.ids[0], tokens.counted[0])
        expected = [each["content"].strip() for each in messages if each["role"] == "assistant"]
        assert answers == [f"{answer}<|im_end|>" for answer in expected] * 8


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_conversations_in_tables(tmp_path: Path, kind: str) -> None:
    """Columns of structs have every key in every message; those that are null are not there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = [{**each, "tool_calls": None} for each in ONE]
    table = pa.table({"id": ["a"] * 4, "messages": [messages] * 4})
    path = tmp_path / f"d.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    tokenizer = chat_tokenizer()
    ids = tokenizer(tokenizer.apply_chat_template(ONE, tokenize=False)).input_ids
    tokens = calibration_tokens(tokenizer, str(path), TextOptions(), 1, len(ids) * 4, 0)
    assert tokens.ids[0].tolist() == ids * 4


def test_a_named_column_or_pair_wins(tmp_path: Path) -> None:
    row = {"text": "plain", "chosen": ONE, "a": "ask me", "b": "an answer"}
    path = lines(tmp_path / "d.jsonl", [row] * 4)
    tokenizer = chat_tokenizer()
    ids = tokenizer(tokenizer.apply_chat_template(ONE, tokenize=False)).input_ids
    for column in ("chosen", "a+b"):
        options = TextOptions(text_column=column)
        tokens = calibration_tokens(tokenizer, path, options, 1, len(ids) * 4, 0)
        assert tokens.ids[0].tolist() == ids * 4
    plain = calibration_tokens(tokenizer, path, TextOptions(), 1, 26, 0)
    assert tokenizer.decode(plain.ids[0]) == "plain\n\nplain\n\nplain\n\nplain"


def test_without_a_template_there_is_a_remedy(tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", [{"messages": CHAT}] * 4)
    tokenizer = chat_tokenizer(None)
    with pytest.raises(DataError, match=r"no chat template .* --chat-template FILE"):
        calibration_tokens(tokenizer, path, TextOptions(), 1, 8, 0)
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    options = TextOptions(chat_template=str(template))
    given = calibration_tokens(tokenizer, path, options, 2, 16, 0)
    own = calibration_tokens(chat_tokenizer(), path, TextOptions(), 2, 16, 0)
    assert torch.equal(given.ids, own.ids)
    for bad, message in ((tmp_path / "none.jinja", "No such file"), (tmp_path, "a directory")):
        with pytest.raises(ConfigError, match=message):
            options = TextOptions(chat_template=str(bad))
            calibration_tokens(tokenizer, path, options, 1, 8, 0)


def test_conversations_that_the_template_refuses_are_counted(tmp_path: Path) -> None:
    rows = [{"messages": TURNS}, {"messages": CHAT}, {"messages": ONE}]
    path = lines(tmp_path / "d.jsonl", rows)
    tokens = calibration_tokens(chat_tokenizer(GEMMA), path, TextOptions(), 1, 60, 0)
    assert tokens.text["conversations"] == 2
    assert tokens.text["refused"] == 1
    assert "line 2: the chat template refuses it: System role" in tokens.text["first_refusal"]
    path = lines(tmp_path / "e.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError, match=r"no conversation could be used; .*line 1: .*System role"):
        calibration_tokens(chat_tokenizer(GEMMA), path, TextOptions(), 1, 60, 0)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "judge", "content": "x"}], r"line 1: 'messages', message 1 .*'judge'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "holds 'image', not text"),
        ([{"role": "user", "content": 5}], "'content' is not a string but a number"),
        (["hello"], "no column `text` and no known form .*messages \\(a list of str\\)"),
    ],
)
def test_messages_that_are_none(tmp_path: Path, messages: Any, reason: str) -> None:
    path = lines(tmp_path / "d.jsonl", [{"messages": messages}])
    with pytest.raises(DataError, match=reason):
        calibration_tokens(chat_tokenizer(), path, TextOptions(), 1, 8, 0)


@pytest.mark.parametrize("masked", [False, True])
def test_a_templates_bos_stands_once(tmp_path: Path, masked: bool) -> None:
    """The tokenizer puts a BOS before a text, and the template puts one before a conversation."""
    tokenizer = chat_tokenizer(GEMMA, bos=True)
    path = lines(tmp_path / "d.jsonl", [{"messages": ONE}] * 3)
    whole = tokenizer(tokenizer.apply_chat_template(ONE, tokenize=False)).input_ids[2:]
    seqlen = 1 + len(whole)
    tokens = calibration_tokens(tokenizer, path, TextOptions(), 3, seqlen, 0, masked=masked)
    assert all(row == [tokenizer.bos_token_id, *whole] for row in tokens.ids.tolist())
    if tokens.counted is not None:
        assert not tokens.counted[:, 0].any()
        assert np.all(tokens.counted.sum(1).tolist() == [len("an answer") + 1] * 3)
    first = evaluation_tokens(tokenizer, path, TextOptions(), seqlen).ids
    assert first.tolist() == tokens.ids.tolist()
