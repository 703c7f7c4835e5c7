"""The shapes of a model's layers and the cost of its forwards, without reading weights.

They come from the config and the safetensors headers of a model folder, or from a bare config.json.
Blocks of the same structure are profiled once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pipeline.config.layers import LayerRules
from pipeline.config.solver import SolverSettings
from pipeline.models.experts import Experts, expert_of, send_every_token
from pipeline.models.forward_capture import BlockCall, ModelEnds
from pipeline.models.linears import linear_layers, unsupported_parameters, unsupported_reason
from pipeline.models.selection import check_lists, check_rules, settings_of
from pipeline.models.skeleton import FORWARD_DTYPES, Skeleton
from pipeline.models.text_forward import HollowSkeleton
from pipeline.planning.shapes.experts import route_evenly, stub_others, with_others
from pipeline.planning.shapes.profile import (
    META,
    ForwardProfile,
    find_groups_on_meta,
    on_meta,
    profile_forward,
    saved_bytes,
)
from pipeline.planning.shapes.source import open_source
from pipeline.solvers.registry import solver_for
from pipeline.worker.solve import parted
from storage.errors import ModelError
from storage.object_store import Place

# Assumed bytes of a weight file, for a model of which only the config is known.
ASSUMED_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class GroupShape:
    """A group: layers that share an input.

    layers: (name, R, C) of each. columns: C. override: their settings, where those are not the
    job's. kept: whether inputs are kept in place of the Hessian while they are fewer than C, as
    those of experts are. experts, active: for a group of an expert, the number of experts and how
    many of them each token is routed to; 0 where the group gets every token.
    """

    layers: tuple[tuple[str, int, int], ...]
    columns: int
    override: SolverSettings | None = None
    kept: bool = False
    experts: int = 0
    active: int = 0

    @property
    def share(self) -> float:
        """Share of the tokens that the group gets, with even routing."""
        return self.active / self.experts if self.experts else 1.0


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """One kind of block.

    groups: in the order of their layers; empty where the block stays dense; equal groups of experts
    are repeated. parameters: number of weights. full, observed: the forward of one sequence, in
    full, and up to the last input that statistics are taken of.
    """

    groups: tuple[GroupShape, ...]
    parameters: int
    full: ForwardProfile
    observed: ForwardProfile

    @property
    def pruned(self) -> int:
        """Number of weights in the layers that are pruned."""
        return sum(r * c for g in self.groups for _, r, c in g.layers)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything about a model that a plan depends on.

    kinds: its different kinds of blocks. blocks: the kind of each block, in order. hidden: width of
    the hidden states. vocabulary: tokens. ends: number of weights outside the blocks, without the
    output embedding. head: those of the output embedding; 0 where it is tied to the input's. files:
    bytes of the weight files. itemsize: bytes of a stored weight. dtype: name of the dtype of
    forwards. seqlen: tokens of a sequence in the profiles. passed_by: blocks that a forward of text
    does not reach. unsupported: why the model cannot be pruned; None if it can be. stored_as: how a
    model in few bits is stored, for people; its sizes here are those of the bfloat16 model.
    """

    name: str
    kinds: tuple[BlockShape, ...]
    blocks: tuple[int, ...]
    hidden: int
    vocabulary: int
    ends: int
    head: int
    files: tuple[int, ...]
    itemsize: int
    dtype: str
    seqlen: int
    passed_by: tuple[int, ...] = ()
    unsupported: str | None = None
    stored_as: str = ""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(self.files)

    @property
    def parameters(self) -> int:
        """Number of all weights."""
        return sum(self.kinds[k].parameters for k in self.blocks) + self.ends + self.head

    @property
    def forward_itemsize(self) -> int:
        """Bytes of an activation and of a weight in forwards."""
        return FORWARD_DTYPES[self.dtype].itemsize

    def kind(self, block: int) -> BlockShape:
        """The shape of the block with this index."""
        return self.kinds[self.blocks[block]]


def read_shape(
    model: Place,
    *,
    seqlen: int,
    rules: LayerRules | None = None,
    all_experts: bool = False,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> ModelShape:
    """The shape of the model in a folder, or of a bare config.json.

    seqlen: tokens of a calibration sequence. rules: which layers are pruned, and how; None: all.
    all_experts: whether the statistics of every expert are those of all tokens.
    Raises `ModelError` and `ConfigError` as `open_skeleton` does, and for blocks that do not run
    on the meta device.
    """
    source = open_source(model, dtype, trust_remote_code, attn_implementation)
    return shape_of(
        source.skeleton,
        name=source.name,
        files=source.files,
        itemsize=source.itemsize,
        seqlen=seqlen,
        rules=rules or LayerRules(settings=SolverSettings()),
        all_experts=all_experts,
    )


@torch.no_grad()
def shape_of(
    skeleton: Skeleton,
    *,
    name: str,
    files: tuple[int, ...],
    itemsize: int,
    seqlen: int,
    rules: LayerRules,
    all_experts: bool,
) -> ModelShape:
    """The shape of the model of a skeleton, whose modules are changed: do not use it afterwards.

    files, itemsize: see `ModelShape`. Others: see `read_shape`.
    """
    hollow = HollowSkeleton(
        skeleton.model, skeleton.files, skeleton.blocks_path, skeleton.dtype, skeleton.plan
    )
    ends, head = _outside(hollow)
    tokens = torch.zeros((1, seqlen), dtype=torch.int64)
    module_ends = ModelEnds(hollow, torch.device("cpu"), head=False)
    calls = module_ends.calls(tokens)
    hidden = int(module_ends.embed(tokens[:, :1]).shape[-1])
    hidden_states = torch.empty((1, seqlen, hidden), dtype=skeleton.dtype, device=META)
    check_lists(hollow)
    check_rules(hollow, rules)
    kinds, blocks, reason = _block_shapes(hollow, calls, hidden_states, rules, all_experts)
    if not any(kind.groups for kind in kinds):
        raise ModelError(f"{name}: no layer is left to prune")
    shape = ModelShape(
        name=name,
        kinds=kinds,
        blocks=blocks,
        hidden=hidden,
        vocabulary=int(hollow.model.get_input_embeddings().num_embeddings),
        ends=ends,
        head=head,
        files=files,
        itemsize=itemsize,
        dtype=str(skeleton.dtype).removeprefix("torch."),
        seqlen=seqlen,
        passed_by=tuple(index for index, call in enumerate(calls) if call.passed_by),
        unsupported=reason,
        stored_as=skeleton.files.source.stored_as,
    )
    return shape if files else replace(shape, files=_assumed_files(shape))


def _block_shapes(
    hollow: HollowSkeleton,
    calls: Sequence[BlockCall],
    hidden_states: Tensor,
    rules: LayerRules,
    all_experts: bool,
) -> tuple[tuple[BlockShape, ...], tuple[int, ...], str | None]:
    """The distinct shapes of blocks, the index of each block's shape, and `unsupported`.

    See `ModelShape`, which has all three.
    """
    kinds: dict[tuple[object, ...], int] = {}
    shapes: list[BlockShape] = []
    blocks = []
    reason = None
    for index, (block, call) in enumerate(zip(hollow.blocks, calls, strict=True)):
        settings = settings_of(hollow, index, rules)
        for layer in settings if hollow.files.tensors else ():
            hollow.weight_name(index, layer)  # or it could not be written back
        sizes = tuple(p.shape for p in block.parameters())
        key = (str(block), call.passed_by, _signature(call), sizes, tuple(settings.items()))
        if key not in kinds:
            kinds[key] = len(shapes)
            config = hollow.model.config.get_text_config()
            kind, why = _block_shape(
                *(block, on_meta(call), hidden_states, settings, rules, all_experts, config)
            )
            shapes.append(kind)
            reason = reason or why
        blocks.append(kinds[key])
    return tuple(shapes), tuple(blocks), reason


def _outside(model: Skeleton) -> tuple[int, int]:
    """Number of weights outside the blocks: without the output embedding, and of the latter.

    The latter is 0 where the output embedding is the input's.
    """
    inside = {id(p) for p in model.blocks.parameters()}
    embedding = model.model.get_input_embeddings()
    output = model.model.get_output_embeddings()
    outside = {id(p): p.numel() for p in model.model.parameters() if id(p) not in inside}
    head = 0 if output is None else sum(outside.get(id(p), 0) for p in output.parameters())
    if output is not None and any(
        p is q for p in output.parameters() for q in embedding.parameters()
    ):
        head = 0  # counted once already
    return sum(outside.values()) - head, head


def _assumed_files(shape: ModelShape) -> tuple[int, ...]:
    total = shape.parameters * shape.itemsize
    count = max(1, -(-total // ASSUMED_FILE_BYTES))
    return tuple((i + 1) * total // count - i * total // count for i in range(count))


def _signature(call: BlockCall) -> str:
    """Shapes and dtypes of a call's tensors: blocks with another mask have another cost."""
    positional = {str(index): value for index, value in enumerate(call.arguments)}
    named = {**positional, **call.keywords}
    return repr(
        {
            key: (tuple(value.shape), str(value.dtype))
            if isinstance(value, Tensor)
            else type(value)
            for key, value in named.items()
        }
    )


def _block_shape(
    block: nn.Module,
    call: BlockCall,
    hidden_states: Tensor,
    settings: dict[str, SolverSettings],
    rules: LayerRules,
    all_experts: bool,
    config: object,
) -> tuple[BlockShape, str | None]:
    """The shape of a block, and why it cannot be pruned (None if it can be).

    settings: layer -> settings, for the layers to prune.
    """
    block = block.to(META)
    hidden = unsupported_parameters(block)
    reason = unsupported_reason(block, hidden) if hidden else None
    active = route_evenly(block)
    others = stub_others(block, config) if hidden else []
    profile = profile_forward(block, call, hidden_states)
    profile = replace(profile, saved=saved_bytes(block, call, hidden_states))
    full = with_others(profile, others, hidden_states.shape[1])
    if all_experts:
        send_every_token(block)
    shared = find_groups_on_meta(block, call, hidden_states, settings) if settings else ()
    layers = linear_layers(block)
    groups, needs = [], {}
    for names in parted(shared, settings):
        group_settings = settings[names[0]]
        shapes = tuple((name, *layers[name]) for name in names)
        override = None if group_settings == rules.settings else group_settings
        group = GroupShape(layers=shapes, columns=shapes[0][2], override=override)
        groups.append(_with_experts(group, block, active, all_experts))
        needs[names[0]] = solver_for(group_settings).needs
    observed = full
    if groups and not others:
        observed = profile_forward(block, call, hidden_states, needs)
    for stacked, count, each in others:
        alike = GroupShape(layers=stacked, columns=stacked[0][2], kept=True, experts=count)
        groups += [replace(alike, active=each)] * count
    parameters = sum(p.numel() for p in block.parameters())
    shape = BlockShape(
        groups=_named_alike(groups), parameters=parameters, full=full, observed=observed
    )
    return shape, reason


def _with_experts(
    group: GroupShape, block: nn.Module, active: dict[str, int], all_experts: bool
) -> GroupShape:
    """The group with `kept`, `experts` and `active` set, if its layers belong to an expert.

    active: path of a module of experts -> experts per token.
    """
    name = group.layers[0][0]
    if expert_of(block, name) is None:
        return group
    if all_experts:
        return replace(group, kept=True)
    path = next(path for path in active if name.startswith(f"{path}."))
    module = block.get_submodule(path)
    assert isinstance(module, Experts)
    return replace(group, kept=True, experts=module.count, active=active[path])


def _named_alike(groups: list[GroupShape]) -> tuple[GroupShape, ...]:
    """The groups, with those of experts of the same shapes replaced by the first of them.

    So they compare equal, and are planned once.
    """
    first: dict[tuple[object, ...], GroupShape] = {}
    alike = []
    for group in groups:
        shapes = tuple((rows, columns) for _, rows, columns in group.layers)
        key = (shapes, group.override, group.experts, group.active)
        alike.append(first.setdefault(key, group) if group.kept else group)
    return tuple(alike)
