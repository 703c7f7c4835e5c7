"""Experts in MXFP4, as gpt-oss is published: blocks of 32 FP4 values, each with an exponent."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from pipeline.formats.dequantize import from_mxfp4
from storage.errors import ModelError
from storage.model.few_bits import Dequantized
from storage.model.files import ModelFiles

_BLOCKS, _SCALES = "_blocks", "_scales"


def mxfp4_tensors(files: ModelFiles) -> list[Dequantized]:
    """The stacks of experts that are stored as `NAME_blocks` and `NAME_scales`, as `NAME`.

    NAME is (E, C, R), as the class holds it. Raises `ModelError` for blocks without scales, or of
    other shapes.
    """
    found = []
    for blocks, entry in files.tensors.items():
        name = blocks.removesuffix(_BLOCKS)
        if not blocks.endswith(_BLOCKS) or entry.dtype != "U8":
            continue
        scales = files.tensors.get(name + _SCALES)
        if len(entry.shape) != 4 or scales is None or scales.shape != entry.shape[:-1]:
            raise ModelError(
                f"{files.place}: {blocks} is {list(entry.shape)}, but {name}{_SCALES} is "
                f"{None if scales is None else list(scales.shape)}; download the model again"
            )
        experts, rows, groups, width = entry.shape
        shape = (experts, groups * width * 2, rows)
        decode = partial(_experts, files, name)
        found.append(Dequantized(name, shape, (blocks, name + _SCALES), decode))
    return found


def _experts(files: ModelFiles, name: str, start: int, stop: int) -> Tensor:
    rows = (start, stop)
    return from_mxfp4(files.read(name + _BLOCKS, rows=rows), files.read(name + _SCALES, rows=rows))
