"""The model of a plan: a model folder, of which only file headers are read, or a config.json."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.models.expert_tensors import stored_together
from pipeline.models.experts import unstack_experts
from pipeline.models.forward_capture import BlockCall, ModelEnds
from pipeline.models.from_config import build, load_config_alone, rehearse
from pipeline.models.skeleton import FORWARD_DTYPES, Skeleton, find_blocks, open_skeleton
from pipeline.models.text_forward import HollowSkeleton, text_forward
from pipeline.models.transformers_loading import Routes, tie, tied_names
from storage.errors import ConfigError, ModelError
from storage.files.listing import listed
from storage.model.files import ModelFiles
from storage.model.folder import LocalFolder
from storage.model.safetensors_format import torch_dtype
from storage.object_store import ObjectFolder, Place


@dataclass(frozen=True)
class PlannedSource:
    """A model on the meta device.

    files: bytes of its weight files, empty for a bare config. itemsize: bytes of a stored weight.
    """

    skeleton: Skeleton
    name: str
    files: tuple[int, ...]
    itemsize: int


def open_source(
    model: Place,
    dtype: str | None,
    trust_remote_code: bool,
    attn_implementation: str | None = None,
) -> PlannedSource:
    """The model of a folder, or of a bare config.json; the rest as for `open_skeleton`.

    Raises `ModelError` and `ConfigError` as `open_skeleton` does.
    """
    if isinstance(model, ObjectFolder) or (model.is_dir() and listed(model, "*.safetensors")):
        skeleton = open_skeleton(
            model,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
        files = tuple(skeleton.files.size(file) for file in skeleton.files.files)
        stored = [torch_dtype(entry.dtype) for entry in skeleton.files.tensors.values()]
        itemsize = max((d.itemsize for d in stored if d.is_floating_point), default=2)
        return PlannedSource(skeleton, model.name, files, itemsize)
    path = model / "config.json" if model.is_dir() else model
    if path != model and not os.path.lexists(path):
        raise ModelError(f"{model}: no config.json; give a Hugging Face model folder")
    config = load_config_alone(path, trust_remote_code)
    declared = getattr(config.get_text_config(), "dtype", None)
    saved = declared if isinstance(declared, torch.dtype) else torch.bfloat16
    if dtype is not None and dtype not in FORWARD_DTYPES:
        raise ConfigError(f"--dtype {dtype} is not one of {', '.join(FORWARD_DTYPES)}")
    forward = FORWARD_DTYPES[dtype] if dtype is not None else saved
    if not trust_remote_code:
        rehearse(config, path, forward)
    built = build(config, path, forward, trust_remote_code, attn_implementation)
    tie(built, set(tied_names(built)))  # as a model of this config is published
    unstack_experts(built, stored_together(built, Routes(built, ()), None))
    nothing = ModelFiles(LocalFolder(path.parent), (), {}, {}, None)
    skeleton = Skeleton(built.eval(), nothing, find_blocks(built, path), forward)
    name = path.parent.name if path.name == "config.json" else path.stem
    return PlannedSource(skeleton, name, (), saved.itemsize)


@torch.no_grad()
def example_block(
    model: Place,
    dtype: str,
    batch_size: int,
    seqlen: int,
    *,
    block: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, BlockCall, Tensor]:
    """A block with random weights on the CPU, its arguments, and random inputs.

    block: its index; None: in the middle of the model. The inputs are (batch_size, seqlen, hidden)
    in `dtype`.
    """
    skeleton = open_source(model, dtype, trust_remote_code).skeleton
    hollow = HollowSkeleton(skeleton.model, skeleton.files, skeleton.blocks_path, skeleton.dtype)
    tokens = torch.zeros((batch_size, seqlen), dtype=torch.int64)
    ends = ModelEnds(hollow, torch.device("cpu"), head=False)
    reached = text_forward(hollow).reached
    chosen = reached[len(reached) // 2] if block is None else block
    call, hidden = ends.calls(tokens)[chosen], ends.embed(tokens)
    module = hollow.blocks[chosen]
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            value = 0.02 * torch.randn(parameter.shape)
            setattr(owner, name, nn.Parameter(value.to(skeleton.dtype), requires_grad=False))
    return module.eval(), call, torch.randn(hidden.shape).to(skeleton.dtype)
