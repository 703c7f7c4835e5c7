"""Text of the hub, streamed: how much is read, which split and commit, the field's conventions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import datasets
import pytest
import torch

from pipeline.text import crops
from pipeline.text.documents import read_documents
from storage.errors import DataError
from tests.support.texts import calibration_ids, evaluation_ids
from tests.support.tiny_models import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


class CountingRows:
    """Rows of a stream without end, and how many were taken."""

    def __init__(self, texts: Callable[[int], str]) -> None:
        self.texts, self.taken = texts, 0

    def __iter__(self) -> Iterator[dict[str, str]]:
        while True:
            self.taken += 1
            yield {"text": self.texts(self.taken), "url": "u"}


def offer_hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, Iterable[Any]]) -> list[Any]:
    """Let `datasets.load_dataset` stream these rows; return the list of what it was asked for."""
    calls: list[Any] = []

    def load_dataset(
        identifier: str, config: str | None, *, streaming: bool, revision: str | None
    ) -> dict[str, Any]:
        assert streaming
        calls.append((identifier, config, revision) if revision else (identifier, config))
        return dict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_an_endless_stream_is_left_as_soon_as_there_is_enough(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    monkeypatch.setattr(crops, "WINDOW_DOCUMENTS", 50)
    long = CountingRows(lambda n: "x" * (100 if n % 10 == 0 else 5))
    calls = offer_hub(monkeypatch, {"train": long})
    tokens = calibration_ids(tokenizer, "allenai/c4", None, 4, 80, seed=0)
    assert tokens.shape == (4, 80)
    assert calls == [("allenai/c4", "en")]
    assert long.taken < 500

    short = CountingRows(lambda n: "y" * 20)
    calls = offer_hub(monkeypatch, {"train": short})
    assert calibration_ids(tokenizer, "some/data:config", None, 4, 80, 0).shape == (4, 80)
    assert calls[0] == ("some/data", "config")
    assert short.taken < 20_000

    endless = CountingRows(lambda n: "z" * 20)
    offer_hub(monkeypatch, {"train": [], "test": endless})
    assert evaluation_ids(tokenizer, "some/data", None, 80, nsamples=4).shape == (4, 80)
    assert endless.taken < 2_000


def test_hub_splits(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    def rows(letter: str) -> list[dict[str, str]]:
        return [{"text": letter * 100}]

    offer_hub(monkeypatch, {"train": rows("a"), "test": rows("b"), "validation": rows("c")})
    assert tokenizer.decode(calibration_ids(tokenizer, "x/y", None, 1, 4, 0)[0]) == "aaaa"
    assert tokenizer.decode(evaluation_ids(tokenizer, "x/y", None, 4)[0]) == "bbbb"
    offer_hub(monkeypatch, {"test": rows("b")})
    with pytest.raises(DataError, match="x/y has no split train, but test"):
        calibration_ids(tokenizer, "x/y", None, 1, 4, 0)


def test_c4_as_the_field_evaluates_on_it(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """Validation, the first 1,100 documents, joined with spaces, and of them 256 pieces."""
    documents = [f"{n:x}" * (5 + n % 7) for n in range(1, 3000)]
    rows = [{"text": text} for text in documents]
    text = " ".join(documents[:1100])
    calls = offer_hub(monkeypatch, {"train": [{"text": "no"}], "validation": rows})
    tokens = evaluation_ids(tokenizer, "allenai/c4", None, 32, revision="abc")
    assert calls == [("allenai/c4", "en", "abc")]
    assert tokens.shape == (256, 32)
    assert tokens.flatten().tolist() == tokenizer(text).input_ids[: 256 * 32]
    # Less text than 256 pieces: what there is, the tail dropped.
    tokens = evaluation_ids(tokenizer, "allenai/c4:en", None, 1000)
    assert tokens.flatten().tolist() == tokenizer(text).input_ids[: len(text) // 1000 * 1000]
    assert 1 < len(tokens) < 256
    # Asked for some, they are the first of these; of more than 1,100 documents there are none.
    assert torch.equal(evaluation_ids(tokenizer, "allenai/c4", None, 1000, 2), tokens[:2])
    with pytest.raises(DataError, match="fewer than"):
        evaluation_ids(tokenizer, "allenai/c4", None, 1000, len(tokens) + 1)


def test_wikitext_as_the_field_evaluates_on_it(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    """The test split, empty rows counted, joined with blank lines; all of it."""
    lines = ["", " = Title = \n", "", *(f" word {n} \n" for n in range(40)), ""]
    rows = [{"text": line} for line in lines]
    calls = offer_hub(monkeypatch, {"train": [{"text": "no"}], "test": rows})
    tokens = evaluation_ids(tokenizer, "Salesforce/wikitext", None, 32)
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1")]
    ids = tokenizer("\n\n".join(lines)).input_ids
    assert tokens.flatten().tolist() == ids[: len(ids) // 32 * 32]


def test_the_hub_out_of_reach_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="no/such is not a local file") as caught:
        list(read_documents("no/such"))
    assert "Couldn't reach the hub" in str(caught.value)
    assert "\n" not in str(caught.value)
