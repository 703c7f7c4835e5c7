"""Llama 4's experts, one by one where they are quantized, stacked as its class holds them.

transformers swaps the class's stack for a list of MLPs while it loads a model that
compressed-tensors compressed. The class itself, which loads the output, knows the stack alone:
`experts.gate_up_proj` (E, C, 2 R) and `experts.down_proj` (E, R, C), each expert transposed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from storage.errors import ModelError
from storage.model.few_bits import DTYPE, Dequantized
from storage.model.files import ModelFiles

_EXPERT = re.compile(r"(.+\.feed_forward\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def stacked(
    files: ModelFiles, tensors: Iterable[Dequantized], config: Mapping[str, Any]
) -> list[Dequantized]:
    """The tensors with Llama 4's experts in two stacks for each block; of other models as they are.

    Raises `ModelError` where an expert lacks a matrix, or has one of another shape.
    """
    made = {tensor.name: tensor for tensor in tensors}
    if config.get("model_type") not in ("llama4", "llama4_text"):
        return list(made.values())
    matrices = {name: _plain(files, name) for name in files.tensors if _EXPERT.fullmatch(name)}
    matrices |= {name: tensor for name, tensor in made.items() if _EXPERT.fullmatch(name)}
    counts: dict[str, int] = {}
    for name in matrices:
        found = _EXPERT.fullmatch(name)
        assert found is not None
        path, number = found.group(1), int(found.group(2))
        counts[path] = max(counts.get(path, 0), number + 1)
    rest = [tensor for tensor in made.values() if tensor.name not in matrices]
    return rest + [
        _stack(files, matrices, path, count, name, parts)
        for path, count in counts.items()
        for name, parts in _STACKS.items()
    ]


def _plain(files: ModelFiles, name: str) -> Dequantized:
    """An expert's matrix that is not quantized."""
    entry = files.tensors[name]

    def decode(start: int, stop: int) -> Tensor:
        return files.read(name, rows=(start, stop)).to(DTYPE)

    return Dequantized(name, entry.shape, (name,), decode)


def _stack(
    files: ModelFiles,
    matrices: Mapping[str, Dequantized],
    path: str,
    count: int,
    name: str,
    parts: tuple[str, ...],
) -> Dequantized:
    names = [[f"{path}.{number}.{part}.weight" for part in parts] for number in range(count)]
    own = [matrices.get(one) for each in names for one in each]
    shapes = {None if one is None else one.shape for one in own}
    if len(shapes) > 1:
        lacking = next((n for each in names for n in each if n not in matrices), None)
        raise ModelError(
            f"{files.place}: the weight files lack {lacking}; the download may be incomplete"
            if lacking
            else f"{files.place}: the experts of {path} are of different shapes"
        )
    stored = tuple(key for one in own if one is not None for key in one.stored)
    first = own[0]
    assert first is not None
    rows, columns = first.shape
    shape = (count, columns, rows * len(parts))
    decode = partial(_experts, matrices, names)
    return Dequantized(f"{path}.{name}", shape, stored, decode)


def _experts(
    matrices: Mapping[str, Dequantized], names: list[list[str]], start: int, stop: int
) -> Tensor:
    """Experts start:stop of a stack (E, C, R), the rows of an expert's matrices in a row."""
    experts = [
        torch.cat([matrices[one].decode(0, matrices[one].shape[0]) for one in each]).T
        for each in names[start:stop]
    ]
    return torch.stack(experts)
