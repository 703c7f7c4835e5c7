"""What a published model folder is made of, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PRUNED = "pruned"
KNOWN, CLASS, FOUND = "config", "class", "public"
"""Where a layout was taken from: the published config.json as known to the author, transformers'
config class (its docstring and defaults), or copies in public code."""

# What every config.json of a tiny model says, under the names that most families share.
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 259,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


@dataclass(frozen=True)
class Form:
    """One published repository, made small.

    config: config.json as published, its sizes made small. special: what its files have that
    others have not, for the table. renames: pairs (regular expression, replacement) from the names
    of transformers' class to those in the weight files, each applied once to each name.
    experts: (gate, up, down) names of an expert's matrices where the class stacks the experts and
    the files do not. extra: further stored tensors, `{b}` in a name standing for each block, each
    a kind of `folder.EXTRA` and a shape. dropped: regular expression of names that are not
    stored. dtype: of the stored tensors. files: number of weight files. change: name of one of
    `folder.CHANGES`, what is done to the folder at last. stand_in: config of a class with the same
    tensors, where transformers has no class of its own. factory: the class that loads the folder
    beside prox24. outcome: PRUNED, or words of the message that refuses it. source: KNOWN, CLASS or
    FOUND. quick: whether quick tests try it.
    """

    name: str
    config: Mapping[str, Any]
    special: str
    renames: tuple[tuple[str, str], ...] = ()
    experts: tuple[str, str, str] | None = None
    extra: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    dropped: str | None = None
    dtype: str = "bfloat16"
    files: int = 1
    change: str | None = None
    stand_in: Mapping[str, Any] | None = None
    factory: str = "AutoModelForCausalLM"
    outcome: str = PRUNED
    source: str = KNOWN
    quick: bool = False


def llama_like(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    """A config.json with the keys that Llama's successors share; None removes a key."""
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        **SIZES,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0",
        "use_cache": True,
        **changes,
    }
    return {key: value for key, value in config.items() if value is not REMOVED}


class _Removed:
    """Marks a key that a config.json does not have (null is a value)."""


REMOVED = _Removed()
