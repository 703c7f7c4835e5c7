"""Opens a model folder; weights in few bits are read as bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.formats.compressed import compressed_tensors_of
from pipeline.formats.fp8 import fp8_tensors
from pipeline.formats.llama4 import stacked
from pipeline.formats.mxfp4 import mxfp4_tensors
from storage.model.few_bits import DequantizedFolder
from storage.model.files import ModelFiles
from storage.model.folder import ModelFolder
from storage.model.other_formats import quantization, whole_numbers
from storage.object_store import Place


def open_model(place: Place) -> ModelFiles:
    """The files of the model at `place`. Errors as `ModelFiles.read_headers`.

    A model in few bits is read as bfloat16, with the tensor names that transformers' class loads:
    see `DequantizedFolder`.
    """
    files = ModelFiles.read_headers(place, _dequantized)
    if isinstance(files.source, DequantizedFolder):
        files.contradictions |= files.source.contradictions
    return files


def _dequantized(stored: ModelFiles) -> ModelFolder:
    config = quantization(stored.config) or {}
    method = config.get("quant_method")
    dropped: set[str] = set()
    if method == "fp8":
        tensors, dropped = fp8_tensors(stored, config)
        block = whole_numbers(config.get("weight_block_size"))
        kind = f"FP8 in blocks of {' x '.join(map(str, block))}" if block else "FP8"
    elif method == "mxfp4":
        tensors, kind = mxfp4_tensors(stored), "MXFP4"
    else:
        tensors, dropped = compressed_tensors_of(stored, config)
        tensors = stacked(stored, tensors, stored.config)
        kind = f"compressed-tensors ({_text(config.get('format'))})"
    return DequantizedFolder(stored, tensors, dropped, plain_config(stored.config), kind)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without `quantization_config`, and with bfloat16 as its dtype."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    for key in ("dtype", "torch_dtype"):
        if isinstance(plain.get(key), str):
            plain[key] = "bfloat16"
    if not {"dtype", "torch_dtype"} & plain.keys():
        plain["dtype"] = "bfloat16"
    text = plain.get("text_config")
    if isinstance(text, Mapping):
        plain["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
        for key in {"dtype", "torch_dtype"} & text.keys():
            plain["text_config"][key] = "bfloat16"
    return plain


def _text(value: object) -> str:
    return (
        value if isinstance(value, str) and value.isprintable() and len(value) < 40 else "unnamed"
    )
