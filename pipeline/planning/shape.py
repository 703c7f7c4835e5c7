"""A model as the plan sees it: shapes of layers and what a forward costs, read without weights.

From a model folder config and safetensors headers are read; from a bare config.json, what the
config says. Blocks of the same structure are looked at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pipeline.capture import BlockCall, ModelEnds
from pipeline.experts import Experts, expert_of
from pipeline.layers import check_rules, layers_to_prune
from pipeline.linears import unsupported_parameters, unsupported_reason
from pipeline.model import FORWARD_DTYPES, Skeleton
from pipeline.planning.profile import (
    META,
    ForwardProfile,
    find_groups_on_meta,
    on_meta,
    profile_forward,
)
from pipeline.planning.source import HollowSkeleton, open_source
from pipeline.rules import LayerRules
from pipeline.solvers import SolverSettings
from pipeline.text_stack import ties_embeddings
from storage.errors import ModelError
from storage.object_store import Place

# Weight files of a model that is known by its config alone: the usual size of one, in bytes.
ASSUMED_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class GroupShape:
    """Layers that share an input, as (name, R, C), and `columns`, their C.

    count: how many groups are alike (experts); share: of the tokens, which reach each of them.
    """

    layers: tuple[tuple[str, int, int], ...]
    columns: int
    count: int = 1
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """One kind of block. parameters: elements of all its weights. full, observed: a sequence's
    forward, whole and as far as statistics are taken."""

    groups: tuple[GroupShape, ...]
    parameters: int
    full: ForwardProfile
    observed: ForwardProfile

    @property
    def pruned(self) -> int:
        """Elements of the layers that are pruned."""
        return sum(g.count * r * c for g in self.groups for _, r, c in g.layers)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything of a model that a plan depends on.

    kinds: its different blocks; blocks: the kind of each block, in order. ends, head: elements of
    what is loaded to embed, and of the output embedding where it is another. files: bytes of the
    weight files. itemsize: bytes of a stored weight; dtype: of the forward, by name. seqlen: of the
    profiles. unsupported: why it cannot be pruned, if so.
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
    unsupported: str | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(self.files)

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        return sum(self.kinds[k].parameters for k in self.blocks) + self.ends + self.head

    @property
    def forward_itemsize(self) -> int:
        """Bytes of an activation, and of a weight in a forward."""
        return FORWARD_DTYPES[self.dtype].itemsize

    def kind(self, block: int) -> BlockShape:
        """The shape of one block."""
        return self.kinds[self.blocks[block]]


def read_shape(
    model: Place,
    *,
    seqlen: int,
    rules: LayerRules | None = None,
    needs: str = "full",
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> ModelShape:
    """The shape of a model folder, or of a model known by its config.json alone.

    seqlen: tokens of a calibration sequence, which attention depends on. rules: which layers are
    pruned; None: all.
    Raises `ModelError` and `ConfigError` as `open_skeleton` does, and for blocks that do not run
    on the meta device.
    """
    source = open_source(model, dtype, trust_remote_code)
    return shape_of(
        source.skeleton,
        name=source.name,
        files=source.files,
        itemsize=source.itemsize,
        seqlen=seqlen,
        rules=rules or LayerRules(settings=SolverSettings()),
        needs=needs,
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
    needs: str,
) -> ModelShape:
    """The shape of a model whose skeleton is there; the skeleton's model is used up."""
    hollow = HollowSkeleton(skeleton.model, skeleton.files, skeleton.blocks_path, skeleton.dtype)
    ends, head = _outside(hollow)
    tokens = torch.zeros((1, seqlen), dtype=torch.int64)
    module_ends = ModelEnds(hollow, torch.device("cpu"), head=False)
    calls = module_ends.calls(tokens)
    hidden = int(module_ends.embed(tokens[:, :1]).shape[-1])
    hidden_states = torch.empty((1, seqlen, hidden), dtype=skeleton.dtype, device=META)
    kinds: dict[tuple[object, ...], int] = {}
    shapes: list[BlockShape] = []
    blocks = []
    reason = None
    check_rules(hollow, rules)
    for index, (block, call) in enumerate(zip(hollow.blocks, calls, strict=True)):
        layers = layers_to_prune(hollow, index, rules)
        sizes = tuple(p.shape for p in block.parameters())
        key = (str(block), _signature(call), sizes, tuple(layers))
        if key not in kinds:
            kinds[key] = len(shapes)
            config = hollow.model.config.get_text_config()
            kind, why = _block_shape(block, on_meta(call), hidden_states, layers, needs, config)
            shapes.append(kind)
            reason = reason or why
        blocks.append(kinds[key])
    if not any(kind.groups for kind in shapes):
        raise ModelError(f"{name}: no layer is left to prune")
    shape = ModelShape(
        name=name,
        kinds=tuple(shapes),
        blocks=tuple(blocks),
        hidden=hidden,
        vocabulary=int(hollow.model.get_input_embeddings().num_embeddings),
        ends=ends,
        head=head,
        files=files,
        itemsize=itemsize,
        dtype=str(skeleton.dtype).removeprefix("torch."),
        seqlen=seqlen,
        unsupported=reason,
    )
    return shape if files else replace(shape, files=_assumed_files(shape))


def _outside(model: Skeleton) -> tuple[int, int]:
    """Elements that lie outside the blocks: of all but the output embedding, and of that one where
    it is another than the input's."""
    inside = {id(p) for p in model.blocks.parameters()}
    embedding = model.model.get_input_embeddings()
    output = model.model.get_output_embeddings()
    outside = {id(p): p.numel() for p in model.model.parameters() if id(p) not in inside}
    tied = ties_embeddings(model.model.config)
    head = 0 if output is None else sum(outside.get(id(p), 0) for p in output.parameters())
    if output is not None and any(
        p is q for p in output.parameters() for q in embedding.parameters()
    ):
        head, tied = 0, False  # counted once already
    ends = sum(outside.values()) - head
    return ends, 0 if tied else head


def _assumed_files(shape: ModelShape) -> tuple[int, ...]:
    total = shape.parameters * shape.itemsize
    count = max(1, -(-total // ASSUMED_FILE_BYTES))
    return tuple((i + 1) * total // count - i * total // count for i in range(count))


def _signature(call: BlockCall) -> str:
    """What a call's tensors look like: blocks with another mask cost another forward."""
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
    layers: dict[str, tuple[int, int]],
    needs: str,
    config: object,
) -> tuple[BlockShape, str | None]:
    """A block's shape, and why it cannot be pruned, if so."""
    block = block.to(META)
    hidden = unsupported_parameters(block)
    reason = unsupported_reason(block, hidden) if hidden else None
    experts = _stub_experts(block, config, layers)
    layers = {n: s for n, s in layers.items() if expert_of(block, n) is None}
    found = find_groups_on_meta(block, call, hidden_states, layers) if layers else ()
    groups = [
        GroupShape(
            layers=tuple((name, *layers[name]) for name in names), columns=layers[names[0]][1]
        )
        for names in found
    ]
    parameters = sum(p.numel() for p in block.parameters())
    full = profile_forward(block, call, hidden_states)
    observed = full
    if groups and not experts:
        firsts = [group.layers[0][0] for group in groups]
        observed = profile_forward(block, call, hidden_states, firsts, needs=needs)
    if experts:
        groups, full = _with_experts(groups, full, experts, hidden_states.shape[1])
        observed = full
    shape = BlockShape(groups=tuple(groups), parameters=parameters, full=full, observed=observed)
    return shape, reason


def _expert_count(config: object) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((int(n) for name in names if (n := getattr(config, name, None))), 0)


def _stub_experts(
    block: nn.Module, config: object, layers: dict[str, tuple[int, int]]
) -> list[GroupShape]:
    """Modules that hold experts are made to hand their input through: which token goes where is
    not known without data. Returns the experts' groups of layers, of those in `layers`.

    An even share of the tokens is assumed, `num_experts_per_tok` of all experts.
    """
    active = int(getattr(config, "num_experts_per_tok", 0) or 1)
    stacked = _expert_count(config)
    found = []
    for path, module in block.named_modules():
        if isinstance(module, Experts):
            count = module.count
            first = [(n, *s) for n, s in layers.items() if n.startswith(f"{path}.0.")]
        else:
            # In a layout that is not pruned, but counted.
            count = stacked
            first = [
                (f"{path}.{name}", int(p.shape[1]), int(p.shape[2]))
                for name, p in module.named_parameters(recurse=False)
                if p.dim() == 3 and p.shape[0] == stacked
            ]
        if not first:
            continue
        module.forward = lambda hidden_states, *_, **__: torch.zeros_like(hidden_states)
        last = [layer for layer in first if "down_proj" in layer[0]]
        for group in ([layer for layer in first if layer not in last], last):
            if group:
                found.append(
                    GroupShape(
                        layers=tuple(group),
                        columns=group[0][2],
                        count=count,
                        share=active / count,
                    )
                )
    return found


def _with_experts(
    groups: list[GroupShape], full: ForwardProfile, experts: list[GroupShape], seqlen: int
) -> tuple[list[GroupShape], ForwardProfile]:
    """Each expert's matrices as layers of their own, with its share of the tokens.

    The elementwise work of an expert is counted as reading and writing its input and output.
    """
    products, moved, live, operators = full.products, full.moved, 0.0, full.operators
    for group in experts:
        tokens = seqlen * group.share * group.count
        rows = sum(rows for _, rows, _ in group.layers)
        products += 2.0 * tokens * rows * group.columns
        moved += 4.0 * tokens * (rows + group.columns)
        live = max(live, 4 * tokens * (rows + group.columns))
        operators += 4 * group.count
    return [*groups, *experts], replace(
        full,
        products=products,
        moved=moved,
        live=full.live + int(live),
        operators=operators,
    )
