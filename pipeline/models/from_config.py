"""From config.json to a model without weights, with transformers' help and without its trust.

A model folder may come from anyone. transformers believes its config.json: a number of layers is
a list that long, a file name is opened, the name of an attention kernel is fetched from the hub and
run. So what config.json may not say is refused first, and the model is built on the meta device,
where nothing takes memory, before it is built with the buffers that its constructors compute.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import is_kernels_available

from pipeline.models.text_stack import auto_class
from pipeline.models.transformers_loading import (
    WRAPPERS,
    compute_buffers,
    has_flash_attention,
    is_base_class,
    is_causal_lm,
    sees_later_tokens,
)
from storage.errors import ConfigError, ModelError
from storage.files.small_file import read_small
from storage.model.files import ModelFiles
from storage.model.folder import raise_unreadable

MAX_BUFFER_BYTES = 2**30
"""Of all buffers that a model's constructors compute; rotary tables and masks take megabytes."""

MAX_COUNT_ALONE = 10_000
"""Of layers, heads or experts that a config.json may state without weight files to show them."""

_LONGEST_REASON, _END = 300, 100  # characters of a reason, and of them at its end
# What configs call the longest input; where a class has several, the first counts.
_LONGEST_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "max_target_positions",
    "model_max_length",
    "n_ctx",
    "seq_length",
    "seq_len",
    "context_length",
)
# What a config.json says of a model's part in a task.
_ROLE = ("architectures", "is_encoder_decoder", "model_type", "auto_map")
# Numbers of modules, or of entries in a list that a config class makes.
_COUNTS = re.compile(r"((num|n|max)_)?(\w+_)?(layers?|blocks?|heads?|experts?|labels)")
_IMPLEMENTATION = re.compile(r"\w*")
_ATTENTION = "attn_implementation"  # the keyword


def reason(error: BaseException) -> str:
    """An error's message on one line, without unprintable characters.

    Of a long one the middle is left out: what to do stands at the end.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)
    if len(text) <= _LONGEST_REASON:
        return text
    return f"{text[: _LONGEST_REASON - _END - 3]} … {text[-_END:]}"


def needs_own_code(error: BaseException) -> bool:
    """Whether transformers asks for the leave to run a repository's own code."""
    return "trust_remote_code" in str(error)


def load_config(files: ModelFiles, trust_remote_code: bool) -> PretrainedConfig:
    """transformers' config object of a model folder. ModelError if there is none to be had."""
    # Of layers, heads or experts there is a tensor each, or an entry of a tensor each.
    most = max(len(files.tensors), *(n for e in files.tensors.values() for n in (0, *e.shape)))
    held = f"the weight files hold {len(files.tensors)} tensors, of {most} entries in a dimension"
    path = files.folder / "config.json"
    return _checked_config(files.config, path, files.folder, most, held, trust_remote_code)


def load_config_alone(path: Path, trust_remote_code: bool) -> PretrainedConfig:
    """transformers' config object of a config.json without a model.

    Raises ModelError, and errors as `read_small` does.
    """
    raw = read_small(path)
    try:
        contents = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not a readable config.json: {reason(error)}") from error
    if not isinstance(contents, dict):
        raise ModelError(f"{path} holds no JSON object; give a model's config.json")
    held = f"a plan takes {MAX_COUNT_ALONE}"
    return _checked_config(contents, path, path, MAX_COUNT_ALONE, held, trust_remote_code)


def _checked_config(
    contents: Mapping[str, Any], path: Path, source: Path, most: int, held: str, trust: bool
) -> PretrainedConfig:
    _require_causal(contents, path)
    _check_contents(contents, path, most, held, trust)
    try:
        config = AutoConfig.from_pretrained(
            str(source), trust_remote_code=trust, local_files_only=True
        )
    except Exception as error:  # transformers raises nearly anything, and its validators too
        if needs_own_code(error):
            raise _own_code(path) from error
        raise_unreadable(error, source)
        raise ModelError(
            f"{path} is not a config that transformers knows: {reason(error)}"
        ) from error
    if not isinstance(config, PretrainedConfig):
        raise ModelError(f"{path} does not describe a model")
    # Again: what config.json does not say, a class may.
    _require_causal({name: getattr(config, name, None) for name in _ROLE}, path)
    return config


def _check_contents(
    contents: Mapping[str, Any], path: Path, most: int, held: str, trust_remote_code: bool
) -> None:
    """Refuses numbers that the weight files rule out, and what would lead out of the folder."""
    for key, value in _members(contents):
        if isinstance(value, int) and _COUNTS.fullmatch(key) and value > most:
            raise ModelError(f"{path}: {key} is {_shown(value)}, but {held} at most")
        if key == "configuration_files":
            raise ModelError(f"{path} leaves it to other files ({key}); put their contents there")
        if key.endswith("implementation") and not trust_remote_code:
            values = value.values() if isinstance(value, Mapping) else [value]
            if not all(_IMPLEMENTATION.fullmatch(v) for v in values if isinstance(v, str)):
                raise ModelError(
                    f"{path}: {key} names code that is not transformers' own; --trust-remote-code "
                    "allows it"
                )


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of a JSON object and of those in it."""
    pending = [value]  # not by recursion: JSON may be nested as deep as its parser goes
    while pending:
        item = pending.pop()
        if isinstance(item, Mapping):
            yield from item.items()
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _shown(number: int) -> str:
    return str(number) if number < 2**63 else "beyond all measure"


def longest_input(config: PretrainedConfig) -> int | None:
    """Tokens that a model's config allows at most; None where it sets no limit.

    A limit goes by several names. A name counts where the config's class has it: what else is in
    config.json, the class does not know and the model does not keep to (BLOOM's `seq_length`).
    """
    text = config.get_text_config()
    for name in _LONGEST_NAMES:
        value = getattr(text, name, None)
        if type(value) is int and value > 0 and _declares(type(text), name):
            return value
    return None


def _declares(kind: type, name: str) -> bool:
    """Whether a config class has an attribute `name`: as a field, a keyword or another's name."""
    own = (vars(each) for each in kind.__mro__)
    return (
        name in getattr(kind, "attribute_map", {})
        or any(name in each or name in each.get("__annotations__", ()) for each in own)
        or name in inspect.signature(kind).parameters
    )


def require_attention(
    config: PretrainedConfig, dtype: torch.dtype, trust: bool, wanted: str
) -> None:
    """Raises `ConfigError` unless transformers computes attention as `wanted` for this model.

    The name of a kernel on the hub is refused, as is a name for which transformers would fetch one,
    or take another implementation, and one whose masks cannot be used again.
    """
    named = f"--attn-implementation {wanted}"
    if not wanted or not _IMPLEMENTATION.fullmatch(wanted):
        raise ConfigError(f"{named} is no name of transformers' own; no kernel is fetched")
    if wanted == "flex_attention":
        raise ConfigError(
            f"{named} makes masks of one call's own, and prox24 calls blocks for many batches with "
            "the same; give eager, sdpa or flash_attention_2"
        )
    version = re.fullmatch(r"flash_attention_(\d)", wanted)
    if version and is_kernels_available() and not has_flash_attention(int(version[1])):
        raise ConfigError(f"{named}: its package is not installed, and no kernel is fetched")
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(
                copy.deepcopy(config),
                dtype=dtype,
                trust_remote_code=trust,
                attn_implementation=wanted,
            )
    except Exception as error:  # ValueError, ImportError, and what a model's own code may raise
        raise ConfigError(f"{named}: {reason(error)}") from error
    chosen = model.config.get_text_config()._attn_implementation
    if chosen != wanted:
        raise ConfigError(f"{named}: for this model transformers takes {chosen} in its place")


def build(
    config: PretrainedConfig,
    folder: Path,
    dtype: torch.dtype,
    trust: bool,
    attn_implementation: str | None = None,
) -> Any:
    """The model on the meta device, but for the buffers that its constructors compute.

    trust: whether the model's own code may be run. attn_implementation: one that
    `require_attention` lets pass; None: transformers' choice. Raises ModelError if transformers
    cannot build it, or if its buffers would take more than MAX_BUFFER_BYTES.
    """
    try:
        with init_empty_weights(include_buffers=False):
            factory = auto_class(config)
            named = {} if attn_implementation is None else {_ATTENTION: attn_implementation}
            model = factory.from_config(config, dtype=dtype, trust_remote_code=trust, **named)
        compute_buffers(model)
    except Exception as error:  # whatever its constructors make of such a config
        raise _cannot_build(folder, error) from error
    _require_decoder(model, folder)
    return model


def rehearse(config: PretrainedConfig, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model with nothing in memory at all, to be checked before `build`; errors as there."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(
                config, dtype=dtype, trust_remote_code=False
            )
    except Exception as error:
        raise _cannot_build(folder, error) from error
    _require_decoder(model, folder)
    size = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if size > MAX_BUFFER_BYTES:
        raise ModelError(
            f"{folder / 'config.json'} makes tables of {size / 1e9:.1f} GB; look at its number of "
            "positions and its head dimension"
        )
    return model


def _own_code(path: Path) -> ModelError:
    return ModelError(
        f"{path}: the model comes with its own code (`auto_map`), which prox24 runs only with "
        "--trust-remote-code; read the code before you give it"
    )


def _cannot_build(folder: Path, error: Exception) -> ModelError:
    if needs_own_code(error):
        return _own_code(folder / "config.json")
    raise_unreadable(error, folder)
    return ModelError(
        f"{folder}: transformers cannot build a causal LM from its config.json: {reason(error)}"
    )


def _require_causal(contents: Mapping[str, Any], path: Path) -> None:
    """Refuses what AutoModelForCausalLM does not load, and what it would wrap without complaint.

    contents: of a config, what is named in `_ROLE`. A class without any head is loaded as the
    causal LM of its model_type, as weights are published that were saved without one.
    """
    names, kind = contents.get("architectures"), contents.get("model_type")
    if contents.get("is_encoder_decoder"):
        raise ModelError(
            f"{path}: {kind} is an encoder-decoder model; prox24 prunes decoder-only causal LMs"
        )
    if not names or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ModelError(
            f"{path} names no `architectures`; add the class that the weights were saved from, "
            "such as LlamaForCausalLM"
        )
    if any("CausalLM" in name or "LMHead" in name or name in WRAPPERS for name in names):
        return
    own = contents.get("auto_map")
    if isinstance(own, Mapping) and "AutoModelForCausalLM" in own:
        return
    if not is_causal_lm(kind) or not all(is_base_class(name, kind) for name in names):
        raise ModelError(
            f"{path}: {', '.join(names)} is not a causal LM; prox24 prunes decoder-only causal LMs "
            "(classes named ...ForCausalLM or ...LMHeadModel), alone or inside a model for images"
        )


def _require_decoder(model: PreTrainedModel, folder: Path) -> None:
    """Refuses encoders that a class for causal LMs was made of: it takes them as they are."""
    if sees_later_tokens(model):
        raise ModelError(
            f"{folder}: config.json makes {type(model).__name__} an encoder, in which each token "
            "sees those after it (is_decoder is not true, or attention is bidirectional); prox24 "
            "prunes decoder-only causal LMs"
        )
