"""FP8 weights with a scale for each block, as DeepSeek-V3, Qwen3 and MiniMax-M2 are published."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from pipeline.formats.dequantize import from_fp8
from storage.errors import ModelError
from storage.model.few_bits import Dequantized
from storage.model.files import ModelFiles, TensorEntry
from storage.model.other_formats import whole_numbers

_FP8 = ("F8_E4M3", "F8_E5M2")
_FP4 = "I8"  # two values a byte
# Scales of a layer's activations; the weight does not depend on them.
_OF_ACTIVATIONS = ("activation_scale", "input_scale", "qscale_act")


def fp8_tensors(files: ModelFiles, config: Mapping[str, Any]) -> tuple[list[Dequantized], set[str]]:
    """The weights that are stored in FP8, and names of tensors to leave out.

    config: config.json's `quantization_config`. A tensor without a scale is not quantized. Raises
    `ModelError` for FP8 values without a scale, and for scales of another shape than the blocks.
    """
    block = whole_numbers(config.get("weight_block_size"))
    found, dropped = [], set()
    for name, entry in files.tensors.items():
        scale = next((key for key in _scale_names(name) if key in files.tensors), None)
        if entry.dtype in _FP8 and scale is None:
            raise ModelError(
                f"{files.place}: {name} is stored in FP8 ({entry.dtype}) without a "
                f"{name.rpartition('.')[2]}_scale_inv beside it; its values mean nothing alone"
            )
        if scale is None or entry.dtype not in (*_FP8, _FP4) or len(entry.shape) < 2:
            continue
        found.append(_tensor(files, entry, files.tensors[scale], block))
        owner = name.rpartition(".")[0]
        others = {f"{owner}.{key}" for key in _OF_ACTIVATIONS} | {f"{name}_activation_scale"}
        dropped |= others & files.tensors.keys()
    return found, dropped


def _scale_names(name: str) -> Iterator[str]:
    """The names that the scale of tensor `name` can have."""
    yield f"{name}_scale_inv"
    if name.endswith(".weight"):
        owner = name.removesuffix(".weight")
        yield f"{owner}.scale"
        yield f"{owner}.qscale_weight"


def _tensor(
    files: ModelFiles, entry: TensorEntry, scale: TensorEntry, stated: tuple[int, ...]
) -> Dequantized:
    columns = entry.shape[-1] * (2 if entry.dtype == _FP4 else 1)
    shape = (*entry.shape[:-1], columns)
    grid = (1, 1) if math.prod(scale.shape) == 1 else scale.shape[-2:]
    block = _block(files, entry, (shape[-2], columns), scale, grid, stated)
    if len(shape) > 2:  # experts: one at a time
        whole = math.prod(scale.shape) != 1
        decode, step = partial(_experts, files, entry.name, scale.name, block, whole), 1
    else:
        decode = partial(_rows, files, entry.name, scale.name, block, grid)
        step = 1 if grid == (1, 1) else block[0]
    return Dequantized(entry.name, shape, (entry.name, scale.name), decode, step)


def _block(
    files: ModelFiles,
    entry: TensorEntry,
    shape: tuple[int, int],
    scale: TensorEntry,
    grid: tuple[int, ...],
    stated: tuple[int, ...],
) -> tuple[int, int]:
    """Rows and columns of a block.

    The size in the config, if it fits the number of scales; the last blocks may be cut off.
    Otherwise, as for FP4 experts, the scales must divide the weight evenly.
    """
    if len(grid) == 2 and all(grid):
        if len(stated) == 2 and grid == (-(-shape[0] // stated[0]), -(-shape[1] // stated[1])):
            return stated[0], stated[1]
        if shape[0] % grid[0] == 0 and shape[1] % grid[1] == 0:
            return shape[0] // grid[0], shape[1] // grid[1]
    blocks = f"blocks of {' x '.join(map(str, stated))}" if stated else "the whole"
    raise ModelError(
        f"{files.place}: {entry.name} is {list(shape)}, for which {scale.name} of "
        f"{list(scale.shape)} has not the scales of {blocks}; download the model again"
    )


def _rows(
    files: ModelFiles,
    name: str,
    scale: str,
    block: tuple[int, int],
    grid: tuple[int, ...],
    start: int,
    stop: int,
) -> Tensor:
    """Rows start:stop of a weight (R, C), start being the first of a block."""
    if grid == (1, 1):
        scales = files.read(scale).reshape(1, 1)
    else:
        scales = files.read(scale, rows=(start // block[0], -(-stop // block[0])))
    rows = files.read(name, rows=(start, stop))
    # Fewer rows than a block has are all of it, or its last ones.
    return from_fp8(rows, _numbers(scales), (min(block[0], stop - start), block[1]))


def _experts(
    files: ModelFiles,
    name: str,
    scale: str,
    block: tuple[int, int],
    whole: bool,
    start: int,
    stop: int,
) -> Tensor:
    """Experts start:stop of a stack (E, R, C); `whole`: scales (E, r, c), or else one for all."""
    values = files.read(name, rows=(start, stop))
    if whole:
        scales = files.read(scale, rows=(start, stop))
    else:
        scales = files.read(scale).reshape(1, 1, 1).expand(stop - start, 1, 1)
    return from_fp8(values, _numbers(scales), block)


def _numbers(scales: Tensor) -> Tensor:
    """Scales that transformers can multiply with: contiguous."""
    return scales.contiguous()
