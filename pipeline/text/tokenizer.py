"""A model's tokenizer: loading it, and the tokens that it puts before a text."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoTokenizer

from storage.errors import ConfigError, ModelError
from storage.files.names import by_utf8_name
from storage.model.folder import raise_unreadable

# What transformers reads sentencepiece models with: module -> package.
_OF_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}


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
        raise_unreadable(error, folder)
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


def tokens_before(tokenizer: Any, bos: str) -> tuple[int, ...]:
    """The special tokens at the start of every sequence, mostly one or none.

    bos: `auto`: those that the tokenizer puts before a single text; `always`: those, or its BOS
    token; `never`: none.

    Raises ConfigError for `always` where the tokenizer has no BOS token.
    """
    if bos == "never":
        return ()
    plain = list(tokenizer("a", add_special_tokens=False).input_ids)
    whole = list(tokenizer("a").input_ids)
    starts = [n for n in range(len(whole)) if whole[n : n + len(plain)] == plain]
    if starts and starts[0]:
        return tuple(whole[: starts[0]])
    if bos == "auto":
        return ()
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        raise ConfigError("--bos always: the model's tokenizer has no BOS token: leave --bos out")
    return (int(token),)


def describe_bos(tokenizer: Any, before: tuple[int, ...]) -> str:
    """The tokens at the start of every sequence, as results record them; "none" without any."""
    return " ".join(map(str, tokenizer.convert_ids_to_tokens(list(before)))) or "none"
