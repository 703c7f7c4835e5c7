"""Weights that compressed-tensors compressed: FP8 and int8 with scales, int4 packed in int32.

So Llama-4-FP8, RedHat's models and Kimi-K2-Thinking are published. Which of the config's groups a
layer belongs to is found by the layer's name in the files: a group's `targets` are names, patterns
(`re:...`), or classes of modules, and of the latter all linear layers are one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.formats.dequantize import compressed_tensors, from_compressed
from storage.errors import ModelError
from storage.model.few_bits import Dequantized
from storage.model.files import ModelFiles

FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_PACKED, _SHAPE, _SCALE, _ZERO = (
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_zero_point",
)
# Scales of a layer's activations or of the cache; the weight does not depend on them.
_OTHERS = re.compile(r"((input|output)_(scale|zero_point|global_scale)|[qkv]_(scale|zero_point))")


@dataclass(frozen=True)
class _Scheme:
    """A group of the config: its JSON, its format, and the properties of its weights."""

    contents: Mapping[str, Any]
    form: str
    bits: int
    strategy: str
    group: int
    block: tuple[int, ...]


def compressed_tensors_of(
    files: ModelFiles, config: Mapping[str, Any]
) -> tuple[list[Dequantized], set[str]]:
    """The weights that are compressed, and names of tensors to leave out.

    config: config.json's `quantization_config`. A tensor without a scale is not quantized. Raises
    `ModelError` where the library is missing, and for other formats.
    """
    found: list[Dequantized] = []
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise _refused(files, f"sparse weights in the format {sparsity.get('format')}")
    dropped = {name for name in files.tensors if _OTHERS.fullmatch(name.rpartition(".")[2])}
    for name in files.tensors:
        layer, _, kind = name.rpartition(".")
        if f"{layer}.{_SCALE}" not in files.tensors or kind not in ("weight", _PACKED):
            continue
        compressed_tensors()
        found.append(_tensor(files, layer, kind, _scheme(files, layer, config)))
        extra = {f"{layer}.{other}" for other in (_SHAPE, _ZERO, "weight_g_idx")}
        if f"{layer}.weight_g_idx" in files.tensors:
            raise _refused(files, "weights in the order of their activations (weight_g_idx)")
        dropped |= extra & files.tensors.keys()
    return found, dropped if found else set()


def _refused(files: ModelFiles, what: str) -> ModelError:
    return ModelError(
        f"{files.source.where('config.json')}: {what} of compressed-tensors cannot be read, only "
        f"{', '.join(FORMATS)}; take the checkpoint that was not quantized"
    )


def _scheme(files: ModelFiles, layer: str, config: Mapping[str, Any]) -> _Scheme:
    """The group that a layer belongs to: one that names it, or else one of all linear layers."""
    groups = config.get("config_groups")
    known = [g for g in groups.values() if isinstance(g, Mapping)] if groups else []
    named = [group for group in known if any(_names(t, layer) for t in _targets(group))]
    classes = [
        g for g in known if any(not t.startswith("re:") and "." not in t for t in _targets(g))
    ]
    group = next(iter([*named, *classes]), None)
    weights = None if group is None else group.get("weights")
    if group is None or not isinstance(weights, Mapping):
        raise ModelError(
            f"{files.source.where('config.json')}: no group of its quantization_config is that of "
            f"{layer}, whose weight is quantized"
        )
    form = group.get("format") or config.get("format")
    if form not in FORMATS:
        raise _refused(files, f"the format {str(form)[:40]!r}")
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if size and size > 0 else "tensor")
    return _Scheme(
        contents=group,
        form=form,
        bits=int(weights.get("num_bits", 8)),
        strategy=str(strategy),
        group=int(size or 0),
        block=tuple(weights.get("block_structure") or ()),
    )


def _targets(group: Mapping[str, Any]) -> list[str]:
    return [target for target in group.get("targets") or () if isinstance(target, str)]


def _names(target: str, layer: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), layer) is not None
    return target == layer


def _tensor(files: ModelFiles, layer: str, kind: str, scheme: _Scheme) -> Dequantized:
    stored, scales = files.tensors[f"{layer}.{kind}"], files.tensors[f"{layer}.{_SCALE}"]
    rows = stored.shape[0]
    columns = _columns(files, layer, scheme) if kind == _PACKED else stored.shape[1]
    step = scheme.block[0] if scheme.strategy == "block" and scheme.block else 1
    zeros = f"{layer}.{_ZERO}" in files.tensors
    if zeros and kind == _PACKED:
        step = rows  # zero points of several rows are packed together
    parts = {kind: stored.name, _SCALE: scales.name} | (
        {_ZERO: f"{layer}.{_ZERO}"} if zeros else {}
    )
    decode = partial(_rows, files, layer, parts, scheme, (rows, columns))
    return Dequantized(
        f"{layer}.weight", (rows, columns), tuple(parts.values()), decode, max(step, 1)
    )


def _columns(files: ModelFiles, layer: str, scheme: _Scheme) -> int:
    """The columns of a packed weight, by its groups or by `weight_shape`."""
    packed, scales = files.tensors[f"{layer}.{_PACKED}"], files.tensors[f"{layer}.{_SCALE}"]
    columns = scales.shape[-1] * scheme.group
    if scheme.strategy == "group" and columns * scheme.bits == packed.shape[1] * 32:
        return columns
    if f"{layer}.{_SHAPE}" not in files.tensors:
        raise ModelError(f"{files.place}: {layer} lacks {_SHAPE}; download the model again")
    return int(files.read(f"{layer}.{_SHAPE}")[-1])


def _rows(
    files: ModelFiles,
    layer: str,
    parts: Mapping[str, str],
    scheme: _Scheme,
    shape: tuple[int, int],
    start: int,
    stop: int,
) -> Tensor:
    """Rows start:stop of a layer's weight (R, C), start being the first of a block."""
    stored = {}
    for kind, name in parts.items():
        own = files.tensors[name].shape
        rows = (start, stop)
        if scheme.strategy == "block" and scheme.block and kind in (_SCALE, _ZERO):
            rows = (start // scheme.block[0], -(-stop // scheme.block[0]))
        # A scale of all rows, and packed zero points, are read whole.
        by_row = (own and own[0] == shape[0]) or (scheme.strategy == "block" and len(own) == 2)
        stored[kind] = files.read(name, rows=rows) if by_row else files.read(name)
    if _PACKED in stored:
        stored_shape = (
            files.read(f"{layer}.{_SHAPE}") if f"{layer}.{_SHAPE}" in files.tensors else None
        )
        if stored_shape is not None and stored_shape.tolist() != list(shape):
            raise ModelError(
                f"{files.place}: {layer} has the shape {list(shape)} by its scales, but "
                f"{_SHAPE} says {stored_shape.tolist()}; download the model again"
            )
        stored[_SHAPE] = torch.tensor([stop - start, shape[1]])
    return from_compressed(stored, scheme.contents, scheme.form)
