"""Refuses weight formats that prox24 does not read, and names the command that converts them.

A pickle can run code when it is opened. GGUF and GPTQ weights and the like are quantized: they must
be de-quantized before they can be pruned. `pipeline.formats` does it for READABLE, and it is left
to the user for others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from storage.errors import ModelError

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# The values of `quant_method` that `pipeline.formats` dequantizes.
READABLE = ("fp8", "mxfp4", "compressed-tensors")
# Files that old quantizers wrote in place of an entry in config.json.
_OLD_CONFIGS = {"quantize_config.json": "AutoGPTQ", "quant_config.json": "AWQ"}
# Ends of the names of packed weights.
_PACKED = {
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes",
    ".weight.absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
}
_PLAIN_NAME = re.compile(r"[\w.\- /]+")


def refuse_other_formats(folder: Path, place: object) -> None:
    """Raises ModelError if the weights in `folder` are GGUF or pickled; opens no file.

    place: the folder as the user named it.
    """
    for file, method in _OLD_CONFIGS.items():
        if (folder / file).is_file():
            raise _packed(place, method, f"it has a {file}")
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


def refuse_packed(tensors: Iterable[str], folder: Path, place: object) -> None:
    """Raises ModelError if tensors, by their names, are weights that are packed in few bits.

    For folders whose config.json says nothing of it, as old tools left them.
    """
    for name in tensors:
        suffix = next((s for s in _PACKED if name.endswith(s)), None)
        if suffix is not None:
            old = (method for file, method in _OLD_CONFIGS.items() if (folder / file).is_file())
            raise _packed(place, next(old, _PACKED[suffix]), f"it holds {name}")


def _packed(place: object, method: str, why: str) -> ModelError:
    return ModelError(
        f"{place}: the weights are quantized by {method} ({why}): a stored value means nothing "
        "without its scale, and scales do not fit what pruning leaves; take the checkpoint that "
        "was not quantized"
    )


def _conversion(place: object, gguf: str | None = None) -> str:
    """A shell command that saves a model and its tokenizer to a new folder, NEW."""
    # Names with quotes or other special characters are not put into a shell command.
    if not _PLAIN_NAME.fullmatch(str(place)) or (gguf and not _PLAIN_NAME.fullmatch(gguf)):
        place, gguf = "OLD", gguf and "FILE.gguf"
    program = "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
    if gguf is None:
        program += f"M.from_pretrained('{place}', dtype='auto').save_pretrained('NEW'); "
        program += f"T.from_pretrained('{place}').save_pretrained('NEW')"
    else:
        # transformers would save a model from GGUF as quantized: a new model takes its weights.
        old = f"'{place}', gguf_file='{gguf}'"
        program += f"m = M.from_pretrained({old}); del m.config.quantization_config; "
        program += "n = M.from_config(m.config); n.load_state_dict(m.state_dict()); "
        program += "n.bfloat16().save_pretrained('NEW'); "
        program += f"T.from_pretrained({old}).save_pretrained('NEW')"
    return f'python -c "{program}"'


def whole_numbers(value: object) -> tuple[int, ...]:
    """The sizes in a list of a config.json, such as those of a block; () if it is no such list."""
    if isinstance(value, list) and all(type(size) is int and 0 < size < 2**31 for size in value):
        return tuple(value)
    return ()


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `quantization_config` of a config.json, or of its `text_config`; None without one."""
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, Mapping) else None
        if isinstance(found, Mapping):
            return found
    return None


def refuse_quantized(config: Mapping[str, Any], where: str, *, readable: bool = False) -> None:
    """Raises ModelError if `config`, a config.json, declares quantized weights.

    A stored value of such weights has a meaning only together with its scale and zero point.
    readable: accept the methods in READABLE.
    """
    declared = quantization(config)
    if declared is None or (readable and declared.get("quant_method") in READABLE):
        return
    method = re.sub(r"[^\w.-]", "", str(declared.get("quant_method", "")))[:40] or "unnamed"
    sizes = whole_numbers(declared.get("weight_block_size"))
    blocks = f" in blocks of {' x '.join(map(str, sizes[:2]))}" if sizes else ""
    raise ModelError(
        f"{where}: the weights are quantized ({method}{blocks}): a stored value means nothing "
        "without its scale, and scales do not fit what pruning leaves; take the checkpoint that "
        "was not quantized"
    )
