"""Which part of a row is the text: pure decisions about rows, nothing is read here.

The rule: the column that `--text-column` names; else `text`, where it is there; else a known form
of conversations; else a refusal that lists the columns with what they hold. No single row decides:
the first rows of a data set are looked at together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.errors import DataError

TEXT = "text"
# A column of messages, in the order in which they are looked for.
_OF_MESSAGES = ("messages", "conversations", "conversation")
# Two columns: what is asked and what is answered. A third one adds to the question.
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
_CONTEXT = {"instruction": ("input", "context")}
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_call": "assistant",
}
_KNOWN_ROLES = ("system", "user", "assistant", "tool", "developer")
_SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True)
class Conversation:
    """Messages of a chat, as `apply_chat_template` takes them. place: for messages to the user."""

    messages: tuple[dict[str, Any], ...]
    place: str


@dataclass(frozen=True)
class Form:
    """How a row's text is made.

    columns: that are read. kind: "text" for strings, "messages" for a list of messages, "pair" for
    a question and an answer. named: whether the user named it.
    """

    kind: str
    columns: tuple[str, ...]
    named: bool = False

    def describe(self) -> str:
        """In words, for people and records."""
        names = " + ".join(f"`{name}`" for name in self.columns)
        return f"column {names}" if self.kind == "text" else f"conversations in {names}"


def find_form(
    name: str, head: Sequence[Mapping[str, Any]], wanted: str | None, declared: Iterable[str] = ()
) -> Form:
    """The form of a data set, from its first rows.

    name: of the data set, for messages. wanted: `--text-column`, a column, a dotted path into one,
    or two with a plus between (`prompt+response`). declared: columns of the file, where it has a
    schema.

    Raises DataError, listing the columns with what they hold, where nothing is plainly the text.
    """
    columns = dict.fromkeys([*declared, *(column for row in head for column in row)])
    if wanted is not None:
        return _named(name, head, wanted, columns)
    if TEXT in columns:
        return Form("text", (TEXT,))
    for column in _OF_MESSAGES:
        if any(_is_messages(row.get(column)) for row in head):
            return Form("messages", (column,))
    for pair in _PAIRS:
        if all(column in columns for column in pair):
            return _pair(pair, columns)
    raise DataError(
        f"{name} has no column `text` and no known form of conversations; choose one with "
        f"--text-column: {what_columns_hold(head, columns)}"
    )


def _pair(pair: tuple[str, str], columns: Iterable[str]) -> Form:
    context = [name for name in _CONTEXT.get(pair[0], ()) if name in columns]
    return Form("pair", (pair[0], *context[:1], pair[1]))


def _named(
    name: str, head: Sequence[Mapping[str, Any]], wanted: str, columns: Mapping[str, None]
) -> Form:
    if wanted not in columns and "+" in wanted:
        parts = tuple(part.strip() for part in wanted.split("+"))
        missing = [part for part in parts if part not in columns]
        if len(parts) == 2 and not missing:
            return Form("pair", parts, named=True)
        what = f"no column '{missing[0]}'" if missing else "two columns at most in a pair"
        raise DataError(
            f"{name} has {what}, which --text-column {wanted} names: "
            f"{what_columns_hold(head, columns)}"
        )
    if columns and wanted not in columns and wanted.partition(".")[0] not in columns:
        raise DataError(
            f"{name} has no column '{wanted}': choose one with --text-column: "
            f"{what_columns_hold(head, columns)}"
        )
    values = [value_at(row, wanted) for row in head]
    if any(_is_messages(value) for value in values):
        return Form("messages", (wanted,), named=True)
    return Form("text", (wanted,), named=True)


def columns_read(form: Form) -> tuple[str, ...]:
    """The top-level columns that a form needs: of a dotted path, both it and its first part."""
    parts = [(name, name.partition(".")[0]) for name in form.columns]
    return tuple(dict.fromkeys(name for pair in parts for name in pair))


def value_at(row: Mapping[str, Any], column: str) -> Any:
    """A column's value; a dotted name that is no column's goes into objects. None if not there."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def text_of(form: Form, row: Mapping[str, Any], place: str) -> str | Conversation | None:
    """The row's text or conversation; None for a row without one.

    Raises DataError, naming the place, where a value is not what the form says.
    """
    if form.kind == "pair":
        return _pair_of(form, row, place)
    column = form.columns[0]
    value = value_at(row, column)
    if value is None:
        if form.kind == "messages" and not form.named and isinstance(row.get(TEXT), str):
            raise DataError(
                f"{place} has a column `text`, but the rows before it were read as "
                f"{form.describe()}: choose one with --text-column"
            )
        return None
    if form.kind == "messages":
        return Conversation(_messages(value, f"{place}: '{column}'"), place)
    return _string(value, column, place)


def _string(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{place}: '{column}' is not a string but {what_is(value)}: name the text's column "
            "with --text-column"
        )
    try:
        value.encode("utf-8")  # fails for half a surrogate pair, which JSON can escape
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: '{column}' is not valid Unicode: {error}") from error
    return value


def _pair_of(form: Form, row: Mapping[str, Any], place: str) -> Conversation | None:
    question, *context, answer = form.columns
    asked, answered = row.get(question), row.get(answer)
    if asked is None or answered is None:
        return None
    if isinstance(asked, list):
        before = list(_messages(asked, f"{place}: '{question}'"))
    else:
        text = _string(asked, question, place)
        for name in context:
            if row.get(name):
                text += "\n\n" + _string(row[name], name, place)
        before = [{"role": "user", "content": text}]
    if isinstance(answered, list):
        after = list(_messages(answered, f"{place}: '{answer}'"))
    else:
        after = [{"role": "assistant", "content": _string(answered, answer, place)}]
    return Conversation((*before, *after), place)


def _is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, as OpenAI's or ShareGPT's."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(each, Mapping) and ({"role", "content"} <= set(each) or "from" in each)
            for each in value
        )
    )


def _messages(value: Any, place: str) -> tuple[dict[str, Any], ...]:
    """Messages with `role` and `content`, of either form.

    Raises DataError for what is no list of messages, for an unknown role and for parts that are not
    text.
    """
    if not _is_messages(value):
        raise DataError(
            f"{place} is not a list of messages with `role` and `content` (or `from` and `value`) "
            f"but {what_is(value)}: name another column with --text-column"
        )
    return tuple(_message(each, f"{place}, message {n}") for n, each in enumerate(value, start=1))


def _message(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    role = message.get("role", message.get("from"))
    role = _ROLES.get(str(role).lower(), str(role).lower())
    if role not in _KNOWN_ROLES:
        raise DataError(
            f"{place} is of an unknown role, {role!r}: prox24 knows {', '.join(_KNOWN_ROLES)} and "
            "ShareGPT's human and gpt: rename it in the data"
        )
    content = message["content"] if "content" in message else message.get("value")
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    if content is not None:
        content = _string(content, "content", place)
    # Other keys (`tool_calls`, `reasoning_content`) are the template's. Columns of tables have
    # every key in every message, most of them null.
    others = {
        key: each
        for key, each in message.items()
        if key not in ("role", "from", "content", "value") and each is not None
    }
    return {"role": role, "content": "" if content is None else content, **others}


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise DataError(f"{place} holds {kind!r}, not text: leave such conversations out of the data")


def what_columns_hold(head: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> str:
    """The columns with what they hold, for people."""
    described = []
    for column in columns:
        value = next((row[column] for row in head if row.get(column) is not None), None)
        described.append(f"{column} ({what_is(value)})")
    return ", ".join(described) or "it has no columns"


def what_is(value: Any) -> str:
    """What a value is, for people, with the start of a string."""
    if value is None:
        return "null"
    if isinstance(value, str):
        shown = " ".join(value[: 2 * _SHOWN].split())
        cut = shown[:_SHOWN] + ("..." if len(shown) > _SHOWN or len(value) > 2 * _SHOWN else "")
        return f"a string, {cut!r}"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return f"a number, {value}"
    if isinstance(value, list):
        if not value:
            return "an empty list"
        inner = value[0]
        if isinstance(inner, Mapping):
            return f"a list of objects with {', '.join(map(str, inner))}"
        return f"a list of {type(inner).__name__}"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, value))}"
    return type(value).__name__
