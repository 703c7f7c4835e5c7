"""Weights in formats that prox24 does not open, and the command that makes safetensors of them.

A pickle runs code when it is opened. GGUF, GPTQ and the like hold other numbers than those that are
pruned: what was quantized has to be made ordinary numbers first, which is the user's decision.
`pipeline.formats` does it for some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.errors import ModelError

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Methods that `pipeline.formats` dequantizes.
READABLE = ("fp8", "mxfp4", "compressed-tensors")
_PLAIN_NAME = re.compile(r"[\w.\- /]+")


def refuse_other_formats(folder: Path, place: object) -> None:
    """Raises ModelError where the weights in `folder` are GGUF or pickled; no file is opened.

    `place`: how the user named the folder.
    """
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    if gguf:
        raise ModelError(
            f"{place}: {gguf[0]} is a GGUF file, whose quantized weights are not those that can be "
            f"pruned; make safetensors of it with: {_conversion(place, gguf[0])}"
        )
    if any(path for pattern in _PICKLED for path in folder.glob(pattern)):
        raise ModelError(
            f"{place}: only pickled weights (.bin, .pt, .pth), which can run code when they are "
            "opened, so prox24 does not; if you trust them, make safetensors of them with: "
            f"{_conversion(place)}"
        )


def _conversion(place: object, gguf: str | None = None) -> str:
    """One line for a shell that saves a model and its tokenizer as a new folder, NEW."""
    # A name with quotes or the like is not put into a command for a shell.
    if not _PLAIN_NAME.fullmatch(str(place)) or (gguf and not _PLAIN_NAME.fullmatch(gguf)):
        place, gguf = "OLD", gguf and "FILE.gguf"
    program = "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
    if gguf is None:
        program += f"M.from_pretrained('{place}', dtype='auto').save_pretrained('NEW'); "
        program += f"T.from_pretrained('{place}').save_pretrained('NEW')"
    else:
        # A model from GGUF would be saved as a quantized one: a fresh one takes its weights.
        old = f"'{place}', gguf_file='{gguf}'"
        program += f"m = M.from_pretrained({old}); del m.config.quantization_config; "
        program += "n = M.from_config(m.config); n.load_state_dict(m.state_dict()); "
        program += "n.bfloat16().save_pretrained('NEW'); "
        program += f"T.from_pretrained({old}).save_pretrained('NEW')"
    return f'python -c "{program}"'


def whole_numbers(value: object) -> tuple[int, ...]:
    """Sizes that a config.json states, such as those of a block; empty if it is no list of them."""
    if isinstance(value, list) and all(type(size) is int and 0 < size < 2**31 for size in value):
        return tuple(value)
    return ()


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config.json says of how its weights are quantized; None if they are not.

    Of a model for images and text the text's own configuration may say it.
    """
    for part in (config, config.get("text_config")):
        said = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(said, Mapping):
            return said
    return None


def refuse_quantized(config: Mapping[str, Any], where: str, *, readable: bool = False) -> None:
    """Raises ModelError where a config.json says that the weights are quantized.

    They are stored in pieces (values, scales, zero points) that mean something together only.
    readable: whether the methods that can be read are let through.
    """
    said = quantization(config)
    if said is None or (readable and said.get("quant_method") in READABLE):
        return
    method = re.sub(r"[^\w.-]", "", str(said.get("quant_method", "")))[:40] or "unnamed"
    sizes = whole_numbers(said.get("weight_block_size"))
    blocks = f" in blocks of {' x '.join(map(str, sizes[:2]))}" if sizes else ""
    raise ModelError(
        f"{where}: the weights are quantized ({method}{blocks}): a stored value means nothing "
        "without its scale, and scales do not fit what pruning leaves; take the checkpoint that "
        "was not quantized"
    )
