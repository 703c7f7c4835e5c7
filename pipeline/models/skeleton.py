"""A causal LM taken apart: the skeleton on the meta device, one block at a time on a real one.

Nothing here knows an architecture by name. The model is transformers' own class, built without
weights; its decoder blocks are the list of modules as long as `num_hidden_layers`; weights are
read tensor by tensor from the source's weight files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.formats.open_model import open_model
from pipeline.models.expert_part import ExpertPart
from pipeline.models.from_config import (
    build,
    load_config,
    longest_input,
    rehearse,
    require_attention,
)
from pipeline.models.linears import as_held, is_linear, is_transposed
from pipeline.models.load_plan import LoadPlan, plan_loading
from pipeline.models.text_stack import decoder_path, outside_text
from pipeline.models.transformers_loading import kept_wide
from storage.errors import ConfigError, ModelError
from storage.model.files import ModelFiles, torch_dtype
from storage.object_store import Place

FORWARD_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Skeleton:
    """A model without weights, and where its weights are.

    `blocks_path` is the module path of the block list (`model.layers`), `dtype` the dtype of the
    forward passes, `plan` says which stored tensor each of the model's is. Parameters that are tied
    are one in `model`.
    """

    model: PreTrainedModel
    files: ModelFiles
    blocks_path: str
    dtype: torch.dtype
    plan: LoadPlan = field(default_factory=LoadPlan)

    @property
    def parts(self) -> Mapping[str, ExpertPart]:
        """The parameters that are a part of a stored tensor."""
        return self.plan.parts

    @property
    def loaded(self) -> Set[str]:
        """Names of the stored tensors that the model is made of; others are only copied."""
        return self.plan.loaded

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, in order, parameters on the meta device."""
        blocks = self.model.get_submodule(self.blocks_path)
        if not isinstance(blocks, nn.ModuleList):
            raise ModelError(f"{self.blocks_path} is no list of blocks")
        return blocks

    @property
    def attention(self) -> str:
        """transformers' name of how the model computes attention."""
        return str(self.model.config.get_text_config()._attn_implementation)

    def tensor_name(self, name: str) -> str | None:
        """The name in the weight files of the model's parameter or persistent buffer `name`.

        Of an expert's, which is a part of a tensor, that tensor's. None if it is not stored, or if
        transformers makes it of stored ones by a conversion.
        """
        return self.plan.stored(name)

    def weight_name(self, block: int, layer: str) -> str:
        """The name in the weight files of a block's linear `layer` (its path in the block).

        Raises `ModelError` where it is none of their tensors, nor a part of one.
        """
        parameter = f"{self.block_prefix(block)}{layer}.weight"
        name = self.tensor_name(parameter)
        if name is None:
            if parameter in self.plan.converted:
                made_of = self.plan.converted[parameter]
                raise ModelError(
                    f"{self.files.place}: transformers makes {parameter} of {made_of} when it "
                    "loads it, so that a pruned one could not be written back; leave such layers "
                    "dense with --exclude"
                )
            raise ModelError(f"{self.files.place}: block {block} lacks {layer}.weight")
        return name

    def part(self, block: int, layer: str) -> ExpertPart | None:
        """Which part of a stored tensor a block's linear `layer` is; None where it is all of it."""
        return self.parts.get(f"{self.block_prefix(block)}{layer}.weight")

    def stored_bytes(self, block: int, layer: str) -> int:
        """Bytes that a block's linear `layer` takes in the weight files."""
        entry = self.files.tensors[self.weight_name(block, layer)]
        return (entry.end - entry.start) // (entry.shape[0] if self.part(block, layer) else 1)

    def stored_transposed(self, block: int, layer: str) -> bool:
        """Whether a block's linear `layer` (R, C) is stored as (C, R)."""
        part = self.part(block, layer)
        module = self.blocks[block].get_submodule(layer)
        return is_transposed(module) if part is None else part.transposed

    def read_weight(self, block: int, layer: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A block's linear `layer` (R, C), or rows start:stop of it, on the CPU, as stored.

        Errors as `ModelFiles.read`. Of a layer that is stored transposed, or is a part of a stored
        tensor, all is read.
        """
        name, part = self.weight_name(block, layer), self.part(block, layer)
        if part is None and not self.stored_transposed(block, layer):
            return self.files.read(name, rows=rows)
        weight = part.read(self.files) if part is not None else self.files.read(name).T
        return (weight if rows is None else weight[slice(*rows)]).contiguous()

    def as_stored(self, block: int, layer: str, weight: Tensor) -> Tensor:
        """A linear layer's weight (R, C) in the layout of its weight file.

        Of a part of a stored tensor it is that part, with the first dimension, of 1.
        """
        part = self.part(block, layer)
        if part is not None:
            return part.as_stored(weight)
        return as_held(self.blocks[block].get_submodule(layer), weight).contiguous()

    def block_prefix(self, block: int) -> str:
        """Module path of one block, with the trailing dot."""
        return f"{self.blocks_path}.{block}."

    def load_block(
        self, block: int, device: torch.device, without: Iterable[str] = ()
    ) -> nn.Module:
        """One block with its weights, on `device`, floating tensors in the forward dtype.

        Only this block's tensors are read, and not the weights of its linears `without`, which stay
        on the meta device. Raises `ModelError` for a tensor that is missing.
        """
        module, prefix = copy.deepcopy(self.blocks[block]), self.block_prefix(block)
        skip = {id(module.get_parameter(f"{layer}.weight")) for layer in without}
        self._load(module, prefix, device, skip)
        _require_loaded(module, prefix, self.files.place, skip)
        return module.eval()

    def load_ends(self, device: torch.device, *, head: bool) -> PreTrainedModel:
        """The model with everything but its blocks loaded: embeddings, and with `head` the rest.

        The blocks stay on the meta device: callers give them another `forward`. What a wrapper has
        besides its text stack is NaN on `device`, without memory: some ask its first parameter
        where the model is. Without `head` the output embedding is left out, unless it is tied to
        the input embedding.
        """
        model = copy.deepcopy(self.model)
        output = model.get_output_embeddings()
        skipped: set[int] = set()
        if not head and output is not None:
            tied = {id(p) for p in model.get_input_embeddings().parameters()}
            skipped = {id(p) for p in output.parameters()} - tied
        blocks = {id(p) for p in model.get_submodule(self.blocks_path).parameters()}
        towers = outside_text(model)
        self._load(model, "", device, skip=skipped | blocks | towers)
        _fill_with_nan(model, towers, device)
        if head:
            _require_loaded(model, "", self.files.place, skip=blocks)
        return model.eval()

    def _load(
        self, module: nn.Module, prefix: str, device: torch.device, skip: Set[int] = frozenset()
    ) -> None:
        """Fills `module` from the weight files; parameters whose id is in `skip` stay on meta."""
        loaded: dict[int, nn.Parameter] = {}  # by the id of the one on meta: tied ones stay one
        converted: dict[int, dict[str, Tensor]] = {}
        for path, owner in module.named_modules():
            dotted = f"{prefix}{path}." if path else prefix
            for name, parameter in list(owner.named_parameters(recurse=False)):
                if id(parameter) in skip or not self.plan.has(dotted + name):
                    continue
                if id(parameter) not in loaded:
                    value = self._read(dotted + name, parameter, device, converted)
                    loaded[id(parameter)] = nn.Parameter(value, requires_grad=False)
                setattr(owner, name, loaded[id(parameter)])
            for name, buffer in list(owner.named_buffers(recurse=False)):
                if self.plan.has(dotted + name):
                    setattr(owner, name, self._read(dotted + name, buffer, device, converted))
                elif not buffer.is_meta:
                    # Computed by the constructor (rotary frequencies): its dtype is deliberate.
                    setattr(owner, name, buffer.to(device))

    def check_shape(self, parameter: str, name: str, shape: torch.Size) -> None:
        """Raises `ModelError` where the stored tensor `name` is not of the parameter's shape."""
        stored, part = self.files.tensors[name].shape, self.parts.get(parameter)
        if (stored if part is None else part.shape(stored)) != tuple(shape):
            whose = "it" if part is None else parameter
            raise ModelError(
                f"{name} has shape {list(stored)} in the weight files, but "
                f"{self.files.source.where('config.json')} makes {whose} {list(shape)}"
            )

    def _read(
        self,
        name: str,
        like: Tensor,
        device: torch.device,
        converted: dict[int, dict[str, Tensor]],
    ) -> Tensor:
        """The model's tensor `name`, in the dtype in which transformers would load it.

        like: what the model has in its place. converted: what conversions have made so far.
        """
        stored, part = self.tensor_name(name), self.parts.get(name)
        if stored is not None:
            self.check_shape(name, stored, like.shape)
            value = self.files.read(stored) if part is None else part.read(self.files)
        else:
            conversion = self.plan.converted[name]
            made = converted.setdefault(id(conversion), {})
            if name not in made:
                made |= conversion.read(self.files, self.model)
            if name not in made or made[name].shape != like.shape:
                raise ModelError(
                    f"{self.files.place}: transformers makes of {conversion} no {name} "
                    f"{list(like.shape)}; the weight files do not fit config.json"
                )
            value = made.pop(name)
        wide = any(p.search(name) for p in kept_wide(self.model, self.dtype))
        return value.to(device=device, dtype=torch.float32 if wide else like.dtype)


def open_skeleton(
    place: Place,
    *,
    dtype: str | None,
    trust_remote_code: bool,
    attn_implementation: str | None = None,
) -> Skeleton:
    """Reads config and headers of the model at `place` and checks them against each other.

    `dtype` is the forward passes' dtype by name; None takes the source's: what its config says, or
    else the dtype of its first floating tensor. `attn_implementation` is transformers' name of how
    attention is computed; None leaves it to transformers. No weight is read, but
    for two stored embeddings that ought to be tied: they are compared.

    Raises `ModelError` for a folder that is no decoder-only causal LM, and for tensors that are
    missing or have the wrong shape; `ConfigError` for an attention that transformers does not have
    for this model; `CorruptFileError` for damaged files. What is stored and becomes nothing in the
    model is no reason.
    """
    files = open_model(place)
    config = load_config(files, trust_remote_code)
    forward_dtype = _forward_dtype(config, files, dtype)
    if not trust_remote_code:  # a model's own code may not be fit for it
        _take_apart(rehearse(config, files.folder, forward_dtype), files, forward_dtype)
    if attn_implementation is not None:
        require_attention(config, forward_dtype, trust_remote_code, attn_implementation)
    built = build(config, files.folder, forward_dtype, trust_remote_code, attn_implementation)
    return _take_apart(built, files, forward_dtype)


def _take_apart(model: PreTrainedModel, files: ModelFiles, dtype: torch.dtype) -> Skeleton:
    model.eval()
    plan = plan_loading(model, files)
    skeleton = Skeleton(model, files, find_blocks(model, files.place), dtype, plan)
    _check_tensors(skeleton)
    return skeleton


def check_seqlen(skeleton: Skeleton, seqlen: int) -> None:
    """Raises `ConfigError` where `seqlen` tokens are more than the model's config allows."""
    longest = longest_input(skeleton.model.config)
    if longest is not None and seqlen > longest:
        raise ConfigError(f"--seqlen {seqlen} is above the model's maximum of {longest}")


def check_tokens(skeleton: Skeleton, tokens: Tensor) -> None:
    """Raises `ModelError` where a token id has no embedding: the tokenizer is another model's."""
    vocabulary = skeleton.model.get_input_embeddings().num_embeddings
    if int(tokens.max()) >= vocabulary:
        raise ModelError(
            f"the tokenizer in {skeleton.files.place} gives token {int(tokens.max())}, but the "
            f"model embeds {vocabulary} tokens; copy the model's own tokenizer files into it"
        )


def _forward_dtype(config: PretrainedConfig, files: ModelFiles, name: str | None) -> torch.dtype:
    if name is not None:
        if name not in FORWARD_DTYPES:
            raise ConfigError(f"--dtype {name} is not one of {', '.join(FORWARD_DTYPES)}")
        return FORWARD_DTYPES[name]
    declared = getattr(config.get_text_config(), "dtype", None)
    if isinstance(declared, torch.dtype) and declared.is_floating_point:
        return declared
    # As transformers takes it: of the first that it sees, whether it loads that one or not.
    for entry in sorted(files.tensors.values(), key=lambda entry: (entry.file, entry.name)):
        stored = torch_dtype(entry.dtype)
        if stored.is_floating_point and stored.itemsize > 1:
            return stored
    raise ModelError(f"{files.place} holds no floating-point tensor")


def find_blocks(model: PreTrainedModel, place: Place) -> str:
    """Path of the outermost module list of `num_hidden_layers` entries that hold linears."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    path: str
    decoder = decoder_path(model)
    for path, module in model.named_modules():
        if (
            f"{path}.".startswith(f"{decoder}." if decoder else "")
            and isinstance(module, nn.ModuleList)
            and len(module) == count
            and all(any(is_linear(m) for m in child.modules()) for child in module)
        ):
            return path
    raise ModelError(
        f"{place}: found no list of {count} decoder blocks with linear layers in "
        f"{type(model).__name__}; this architecture is not supported"
    )


def _check_tensors(skeleton: Skeleton) -> None:
    """Compares each of the model's tensors with the headers, before any compute.

    What is stored and becomes nothing is not looked at.
    """
    files, model, plan = skeleton.files, skeleton.model, skeleton.plan
    files.require_consistent(plan.loaded)
    for name in sorted(plan.loaded):
        dtype = torch_dtype(files.tensors[name].dtype)
        if dtype.is_floating_point and dtype.itemsize == 1:
            raise ModelError(
                f"{files.place}: {name} is stored in 8 bits ({files.tensors[name].dtype}), which "
                "prox24 cannot prune; take the checkpoint that was not quantized"
            )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in (parameters | dict(model.named_buffers(remove_duplicate=False))).items():
        stored = skeleton.tensor_name(name)
        if stored is not None:
            skeleton.check_shape(name, stored, tensor.shape)
    missing = [name for name in parameters if not plan.has(name)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"{files.place}: the weight files lack {', '.join(missing[:3])}{more}, which "
            f"{type(model).__name__} needs; the download may be incomplete"
        )


def _fill_with_nan(model: nn.Module, parameters: Set[int], device: torch.device) -> None:
    """Puts NaN, one number in memory each, in place of the parameters with these ids."""
    for owner in model.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if id(parameter) in parameters and parameter.is_floating_point():
                value = torch.full((), torch.nan, dtype=parameter.dtype, device=device)
                nan = nn.Parameter(value.expand(parameter.shape), requires_grad=False)
                setattr(owner, name, nan)


def _require_loaded(
    module: nn.Module, prefix: str, place: Place, skip: set[int] | None = None
) -> None:
    for name, parameter in module.named_parameters():
        if parameter.is_meta and id(parameter) not in (skip or set()):
            raise ModelError(f"{place}: the weight files lack {prefix}{name}")
