"""Hostile files for tests: mutations of good ones, and a guard that watches who reads them.

Documents are mutated as text or bytes, and as structure: any value of a JSON document replaced by
one of HOSTILE, dropped, or given twice. `Watch` runs a reader under a limit of address space and of
processor time, and notes every file that Python opens, lists, makes or removes.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest
from hypothesis import strategies as st

from storage.errors import Prox24Error

PROFILE = hypothesis.settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
MEMORY_BYTES = 256 << 20
CPU_SECONDS = 1.0


def examples(quick: int) -> hypothesis.settings:
    """The fixed profile with `quick` examples; PROX24_FUZZ multiplies them."""
    return hypothesis.settings(
        PROFILE, max_examples=quick * int(os.environ.get("PROX24_FUZZ", "1"))
    )


class Raw:
    """Text that takes a JSON value's place as it is, JSON or not."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return f"Raw({self.text[:20]!r}…)"

    def __deepcopy__(self, memo: object) -> Raw:
        return self


class Twice(dict[str, Any]):
    """An object whose first key is given a second time, with another value."""


HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**53 + 1, 2**62, 2**63, 2**64,
    -(2**63), 10**30, 0.5, 1e308, -0.0,
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 4299), Raw("9" * 5000),
    "", " ", "x", "F32", "BF16", "\ud800", "a\0b", "a\nb\x1b[31m", "x" * 20_000, ".", "..",
    "../../outside.safetensors", "/etc/passwd", "/dev/zero", "//", "outside/weights.safetensors",
    [], {}, [None], [[]], [0, -1], [2**62, 2**62], [Raw("9" * 4000), Raw("9" * 4000)], [0] * 1000,
    {"a": None}, Raw("[" * 50_000 + "]" * 50_000), Raw('{"a":' * 50_000 + "1" + "}" * 50_000),
    Raw("["), Raw("}"), Raw("\x00"), Raw('"\\ud800\\udc00"'),
]  # fmt: skip


def dump(value: Any) -> str:
    """JSON text, with `Raw` and `Twice` as they are meant."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        pairs = [f"{json.dumps(key)}: {dump(item)}" for key, item in value.items()]
        if isinstance(value, Twice) and pairs:
            pairs.append(f"{json.dumps(next(iter(value)))}: 0")
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def places(document: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document, its own included."""
    yield above
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(document, dict):
        items = document.items()
    elif isinstance(document, list):
        items = enumerate(document)
    for key, value in items:
        yield from places(value, (*above, key))


@st.composite
def documents(draw: st.DrawFn, good: Any, extra: tuple[Any, ...] = ()) -> Any:
    """`good` with one to three values replaced, dropped, doubled or added; `extra`: more values."""
    document = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(document))))
        value = copy.deepcopy(draw(st.sampled_from([*HOSTILE, *extra])))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "twice"]))
        document = _changed(document, path, kind, value)
    return document


def _changed(document: Any, path: tuple[Any, ...], kind: str, value: Any) -> Any:
    if not path:
        if isinstance(document, dict) and kind == "twice":
            return Twice(document)
        if isinstance(document, dict) and kind == "add":
            return {**document, "added": value}
        return value
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    if kind == "drop":
        del holder[path[-1]]
    else:
        inner = holder[path[-1]]
        holder[path[-1]] = _changed(inner, (), kind, value)
    return document


@st.composite
def spoiled(draw: st.DrawFn, good: bytes) -> bytes:
    """`good` with bytes flipped, cut out, put in or repeated, cut short, or encoded otherwise."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        count = draw(st.integers(1, 16))
        kind = draw(st.sampled_from(["flip", "put", "cut", "repeat", "huge", "end", "mark"]))
        if kind == "flip" and data:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif kind == "put":
            data[start:start] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "cut":
            del data[start : start + count]
        elif kind == "repeat":
            data[start:start] = data[start : start + count]
        elif kind == "huge":
            data[start : start + 8] = draw(
                st.sampled_from([2**62, 2**63 - 1, 2**64 - 1, 2**31 - 1, 2**32 - 1, 0])
            ).to_bytes(8, "little")
        elif kind == "end":
            del data[start:]
        else:
            data[:0] = draw(st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\x1f\x8b"]))
    return bytes(data)


class Watch:
    """What a reader may use and touch. `roots`: folders whose files it may."""

    def __init__(self, *roots: Path) -> None:
        system = [sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), "/proc", "/sys"]
        here = str(Path(__file__).resolve().parent.parent.parent)
        code = [os.path.join(here, room) for room in ("storage", "pipeline", "cluster", "tests")]
        self.roots = [os.path.realpath(root) for root in (*roots, *system, *code)]
        self.outside: set[str] = set()
        self.seen: set[str] = set()

    def note(self, path: object, follow: bool = True) -> None:
        """A path that was touched; `follow`: if it is a link, what it leads to was."""
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if isinstance(path, str) and "\0" not in path:
            folder, name = os.path.split(path)
            real = os.path.realpath(path) if follow else f"{os.path.realpath(folder)}/{name}"
            self.seen.add(real)
            if not any(real == root or real.startswith(root + os.sep) for root in self.roots):
                self.outside.add(path)

    def run(self, reader: Callable[[], object]) -> None:
        """Runs it. Fails on an error that is not prox24's, or has more than one line, on more
        memory or processor time than the limits, and on a file outside the roots."""
        try:
            with _limits(), _noting(self):
                reader()
        except Prox24Error as error:
            assert str(error), f"{type(error).__name__} without a message"
        assert not self.outside, f"touched {self.outside}"


_EVENTS = {
    "open": 1, "os.listdir": 1, "os.scandir": 1, "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1,
    "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.truncate": 1, "os.chmod": 1,
}  # fmt: skip
_watching: list[Watch] = []
_hooked: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in _EVENTS:
        watch = _watching.pop()  # so that what the note itself touches is not noted
        try:
            follow = event != "open" or not arguments[2] & os.O_NOFOLLOW
            for path in arguments[: _EVENTS[event]]:
                watch.note(os.fspath(path) if isinstance(path, os.PathLike) else path, follow)
        finally:
            _watching.append(watch)


@contextmanager
def _noting(watch: Watch) -> Iterator[None]:
    if not _hooked:
        sys.addaudithook(_hook)  # for good: Python has no way to take one off
        _hooked.append(True)
    _watching.append(watch)
    try:
        yield
    finally:
        _watching.clear()


@contextmanager
def _limits() -> Iterator[None]:
    def late(*_: object) -> None:
        pytest.fail(f"more than {CPU_SECONDS} s of processor time")

    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, late)
    limit = psutil.Process().memory_info().vms + MEMORY_BYTES
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGPROF, handler)
