"""Refuses weight formats that prox24 does not read, and names the command that converts them.

A pickle can run code when it is opened. GGUF and FP8 weights are quantized: they must be
de-quantized before they can be pruned, which is left to the user.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from storage.errors import ModelError

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# The configs by which transformers de-quantizes weights on loading.
_DEQUANTIZES = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
_PLAIN_NAME = re.compile(r"[\w.\- /]+")


def refuse_other_formats(folder: Path, place: object) -> None:
    """Raises ModelError if the weights in `folder` are GGUF or pickled; opens no file.

    place: the folder as the user named it.
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


def refuse_quantized(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError if `config`, a config.json, declares quantized weights.

    A stored value of such weights has a meaning only together with its scale and zero point.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return
    method = re.sub(r"[^\w.-]", "", str(quantization.get("quant_method", "")))[:40] or "unnamed"
    sizes = quantization.get("weight_block_size")
    blocks = ""
    if isinstance(sizes, list) and all(type(size) is int and 0 < size < 2**31 for size in sizes):
        blocks = f" in blocks of {' x '.join(map(str, sizes[:2]))}"
    remedy = "take the checkpoint that was not quantized"
    if method in _DEQUANTIZES:
        remedy += (
            ", or make one in bfloat16: M.from_pretrained(OLD, dtype='bfloat16', "
            f"quantization_config={_DEQUANTIZES[method]}(dequantize=True)).save_pretrained(NEW), M "
            "being transformers' AutoModelForCausalLM"
        )
    raise ModelError(
        f"{where}: the weights are quantized ({method}{blocks}): a stored value means nothing "
        f"without its scale, and scales do not fit what pruning leaves; {remedy}"
    )
