"""BOS at the start of every sequence: by the tokenizer, always, never."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.text import TextOptions
from pipeline.text.tokenizer import tokens_before
from pipeline.text.tokens import calibration_tokens, evaluation_tokens
from storage.errors import ConfigError
from tests.support.chat_models import chat_tokenizer

TEXT = "".join(f"{n:04d}" for n in range(300))


def text_file(folder: Path) -> str:
    (folder / "d.txt").write_text(TEXT)
    return str(folder / "d.txt")


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_every_sequence_starts_as_asked(tmp_path: Path, adds: bool, bos: Any) -> None:
    tokenizer, path = chat_tokenizer(bos=adds), text_file(tmp_path)
    options = TextOptions(bos=bos)
    has = bos == "always" or (bos == "auto" and adds)
    first = [tokenizer.bos_token_id] if has else []
    length = 50 - len(first)
    evaluated = evaluation_tokens(tokenizer, path, options, 50)
    assert [tokenizer.decode(row[len(first) :]) for row in evaluated.ids] == [
        TEXT[start : start + length] for start in range(0, len(TEXT) - length + 1, length)
    ]
    calibrated = calibration_tokens(tokenizer, path, options, 20, 50, 0)
    for tokens in (evaluated, calibrated):
        assert all(row[: len(first)] == first for row in tokens.ids.tolist())
        assert all(tokenizer.bos_token_id not in row[1:] for row in tokens.ids.tolist())
        assert tokens.text["bos"] == ("<|begin|>" if has else "none")
        assert tokens.ids.shape[1] == 50


def test_tokenizers_that_put_several_tokens_before_a_text(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = chat_tokenizer()
    names = ("<|im_start|>", "<|begin|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> <|begin|> $A <|end|>",
        special_tokens=[(n, tokenizer.convert_tokens_to_ids(n)) for n in (*names, "<|end|>")],
    )
    expected = tuple(tokenizer.convert_tokens_to_ids(list(names)))
    assert tokens_before(tokenizer, "auto") == tokens_before(tokenizer, "always") == expected
    assert tokens_before(tokenizer, "never") == ()
    with pytest.raises(ConfigError, match="tokens that the tokenizer puts before a text: raise it"):
        evaluation_tokens(tokenizer, text_file(tmp_path), TextOptions(), 2)


def test_always_needs_a_token(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.bos_token = None
    assert tokens_before(tokenizer, "auto") == ()
    with pytest.raises(ConfigError, match="--bos always: .* no BOS token"):
        evaluation_tokens(tokenizer, text_file(tmp_path), TextOptions(bos="always"), 8)
