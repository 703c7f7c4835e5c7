"""How a model's own forward of text goes through its blocks, seen in a tiny forward.

prox24 runs a model's blocks one at a time, each once, in the order of their list, on what the block
before gave. Whether the model does that is seen here, before anything else is computed: the
blocks are replaced by functions that return random hidden states, and the model around them runs
its own code on a few tokens. Its weights are random numbers that take no memory.

A block that the forward does not call (cross attention to images) is passed by.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.models.skeleton import Skeleton
from storage.errors import ModelError, first_line

NOT_REACHED = "a forward of text does not reach this block"
"""Why the layers of a block that is passed by stay dense."""

_SHAPE = (2, 3)  # sequences and tokens of the tiny forward
_FORMS = 4  # a tensor, and tuples of up to three values
_REFUSED = "; this architecture is not supported"

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with besides its hidden states."""
Visit = Callable[[int, Any, Arguments], Tensor]
"""Is told a block's number, its hidden states and its other arguments, and gives the hidden states
that the block is to return."""


@dataclass(frozen=True)
class TextForward:
    """What a forward of text does with each block of the list.

    returns: of each block the form of its output that the model's code takes: 0 for a tensor, n for
    a tuple of n values, the hidden states first; None for a block that is not called.
    """

    returns: tuple[int | None, ...]

    @property
    def reached(self) -> tuple[int, ...]:
        """Numbers of the blocks that are called; ascending, which is the order of the calls."""
        return tuple(block for block, form in enumerate(self.returns) if form is not None)


class Leave(Exception):
    """Ends a model's forward where all that is wanted has been seen."""


class _Unknown:
    """Stands for what a block returns beside its hidden states."""


_LEARNT: weakref.WeakKeyDictionary[nn.Module, TextForward] = weakref.WeakKeyDictionary()


def text_forward(skeleton: Skeleton) -> TextForward:
    """What a forward of text does with the skeleton's blocks; looked at once for each model.

    Raises `ModelError` where the blocks cannot be run one at a time: hidden states of another form
    than (batch, tokens, hidden), blocks that are called twice, in another order, or that share
    weights, arguments that depend on the tokens, anything that is done between two blocks.
    """
    known = _LEARNT.get(skeleton.model)
    if known is None:
        _require_own_weights(skeleton)
        model = hollow(skeleton)
        with torch.no_grad():
            known = _look(model, blocks_of(model, skeleton.blocks_path))
        _LEARNT[skeleton.model] = known
    return known


class HollowSkeleton(Skeleton):
    """A skeleton whose weights outside the blocks are random numbers that take no memory."""

    def load_ends(self, device: torch.device, *, head: bool) -> PreTrainedModel:
        """See `hollow`; always on the CPU, always with the head."""
        return hollow(self)


def hollow(skeleton: Skeleton) -> PreTrainedModel:
    """The model with random weights outside its blocks, which stay on the meta device.

    Of a weight (V, C) only V + C numbers are held: entry (i, j) is number i + j, so that rows
    differ. The blocks are copies that may be given another `forward`.
    """
    copies = {id(block): copy.copy(block) for block in skeleton.blocks}
    model = copy.deepcopy(skeleton.model, dict(copies))
    generator = torch.Generator().manual_seed(0)
    for owner in _outside(model, set(map(id, copies.values()))):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta:
                shape = parameter.shape
                numbers = torch.rand(max(1, sum(shape) - len(shape) + 1), generator=generator)
                value = numbers.to(parameter.dtype).as_strided(shape, [1] * len(shape))
                setattr(owner, name, nn.Parameter(value, requires_grad=False))
    return model


def _outside(model: nn.Module, blocks: set[int]) -> Iterator[nn.Module]:
    """The modules of a model but for its blocks, which are given by id, and what is in them."""
    pending = [model]
    while pending:
        module = pending.pop()
        yield module
        pending.extend(child for child in module.children() if id(child) not in blocks)


def blocks_of(model: PreTrainedModel, path: str) -> list[nn.Module]:
    """The blocks of a model, whose list is at `path`."""
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return list(blocks)


def run_replaced(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    tokens: Tensor,
    returns: Sequence[int | None],
    visit: Visit,
) -> Any:
    """One forward of `tokens` (batch, seqlen) in which `visit` stands in for every block.

    returns: as in `TextForward`. None where `visit` raised `Leave`.
    """

    def make(number: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            keywords = dict(kwargs)
            hidden_states = args[0] if args else keywords.pop(_first_name(blocks[number]))
            output = visit(number, hidden_states, (tuple(args[1:]), keywords))
            values = returns[number] or 0
            return (output, *(_Unknown() for _ in range(values - 1))) if values else output

        return forward

    try:
        for number, block in enumerate(blocks):
            block.forward = make(number)
        return model(input_ids=tokens, use_cache=False)
    except Leave:
        return None
    finally:
        # They refer to this call's frame, and the cycle would keep the embeddings alive until the
        # garbage collector runs.
        for block in blocks:
            del block.forward


def _first_name(block: nn.Module) -> str:
    """What a block calls its hidden states, where they are given by name."""
    names = list(inspect.signature(type(block).forward).parameters)
    return "hidden_states" if "hidden_states" in names or len(names) < 2 else names[1]


def same_arguments(one: Any, other: Any) -> bool:
    """Whether two nested structures of tensors and plain values are equal."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_arguments(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_arguments, one, other))
    return type(one) is type(other) and (one is other or bool(one == other))


def _require_own_weights(skeleton: Skeleton) -> None:
    """Raises `ModelError` for blocks that are one module, or share a parameter."""
    owners: dict[int, int] = {}
    for number, block in enumerate(skeleton.blocks):
        for parameter in block.parameters():
            other = owners.setdefault(id(parameter), number)
            if other != number:
                name = next(n for n, p in block.named_parameters() if p is parameter)
                raise ModelError(
                    f"blocks {other} and {number} of {type(skeleton.model).__name__} share "
                    f"{name}: it would be pruned twice; this architecture is not supported"
                )


def _look(model: PreTrainedModel, blocks: list[nn.Module]) -> TextForward:
    """Finds out what `text_forward` returns, and refuses what it refuses."""
    look, kind = _Look(model, blocks), type(model).__name__
    tokens = _plain_tokens(model)
    returns = look.find_returns(tokens)
    first = look.walk(tokens, returns)
    second = look.walk(tokens, returns, seed=1, last=first.last)
    third = look.walk(tokens.flip(1), returns)
    for number, arguments in first.arguments.items():
        if _holds_unknown(arguments) or not same_arguments(arguments, second.arguments[number]):
            raise ModelError(
                f"block {number} of {kind} is called with more of what other blocks compute than "
                f"hidden states{_REFUSED}"
            )
        if not same_arguments(arguments, third.arguments[number]):
            raise ModelError(
                f"block {number} of {kind} is called with arguments that depend on the tokens"
                f"{_REFUSED}"
            )
    if not same_arguments(first.output, second.output):
        raise ModelError(f"{kind} makes its output of more than its last block's{_REFUSED}")
    called = first.arguments.keys()
    return TextForward(tuple(r if n in called else None for n, r in enumerate(returns)))


def _plain_tokens(model: PreTrainedModel) -> Tensor:
    """Different tokens from the middle of the vocabulary, none that the config names: code may
    treat padding, or an image's place, in another way."""
    special: set[int] = set()
    for config in (model.config, model.config.get_text_config()):
        for name, value in vars(config).items():
            if name.endswith(("token_id", "token_index")):
                values = value if isinstance(value, list) else [value]
                special |= {each for each in values if isinstance(each, int)}
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    count = _SHAPE[0] * _SHAPE[1]
    ids = (number % vocabulary for number in range(vocabulary // 2, 2 * vocabulary))
    plain = list(itertools.islice((n for n in ids if n not in special), count)) or [0]
    return torch.tensor((plain * count)[:count]).reshape(_SHAPE)


def _holds_unknown(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_unknown, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_unknown, value))
    return isinstance(value, _Unknown)


class _Lost(Exception):
    """A block is not called with the hidden states that the one before returned."""


@dataclass
class _Walk:
    """One tiny forward: what each block was called with, and what came after the last.

    arguments: by the number of the block, in the order of the calls. output: what the output
    embedding was called with, or the logits. wrong: what the model's code did with a form of
    output that it does not take, that of the block which was called last.
    """

    arguments: dict[int, Arguments] = field(default_factory=dict)
    output: Any = None
    wrong: str | None = None

    @property
    def last(self) -> int:
        """The block that was called last."""
        return next(reversed(self.arguments))


class _Look:
    """Tiny forwards of one model."""

    def __init__(self, model: PreTrainedModel, blocks: list[nn.Module]) -> None:
        self.model, self.blocks, self.kind = model, blocks, type(model).__name__

    def find_returns(self, tokens: Tensor) -> list[int]:
        """For each block the form of output whose hidden states reach what comes after it.

        Forms are tried: a model that takes `output[0]` of a tensor drops its first dimension.
        """
        returns, tried = [0] * len(self.blocks), [1] * len(self.blocks)
        why: str | None = None
        while True:
            walk = self.walk(tokens, returns)
            if walk.wrong is None:
                return returns
            why, last = why or walk.wrong, walk.last
            if tried[last] == _FORMS:
                raise self._refusal(f"the blocks of {self.kind} cannot be run one at a time: {why}")
            tried[last] += 1
            # Those after it are most likely alike.
            returns[last:] = [(returns[last] + 1) % _FORMS] * (len(returns) - last)

    def walk(
        self, tokens: Tensor, returns: Sequence[int], *, seed: int = 0, last: int | None = None
    ) -> _Walk:
        """One forward of `tokens`; `seed` decides what the blocks return, but not block `last`.

        Raises `ModelError` for what another form of output does not mend.
        """
        walk, given = _Walk(), torch.empty(0)

        def visit(number: int, hidden_states: Any, arguments: Arguments) -> Tensor:
            nonlocal given
            self._check_call(walk, number, hidden_states, given, tokens)
            walk.arguments[number] = arguments
            own = 2 * number + (0 if number == last else seed)
            generator = torch.Generator().manual_seed(own)
            shape, dtype = hidden_states.shape, hidden_states.dtype
            given = torch.rand(shape, dtype=dtype, generator=generator)
            return given

        def at_head(_: nn.Module, args: tuple[Any, ...]) -> None:
            walk.output = args[0]
            raise Leave

        head = self.model.get_output_embeddings()
        hook = contextlib.nullcontext() if head is None else head.register_forward_pre_hook(at_head)
        try:
            with hook:
                output = run_replaced(self.model, self.blocks, tokens, returns, visit)
        except ModelError:
            raise
        except Exception as error:  # whatever its code makes of a form that it does not take
            if not walk.arguments:
                raise self._refusal(
                    f"the forward of {self.kind} cannot be run on text alone: {first_line(error)}"
                ) from error
            walk.wrong = first_line(error)
            return walk
        if not walk.arguments:
            raise self._refusal(f"a forward of text through {self.kind} calls none of its blocks")
        if output is not None:
            walk.output = getattr(output, "logits", None)
        if getattr(walk.output, "shape", ())[:2] != tokens.shape:
            walk.wrong = "its output is not one vector a token"
        return walk

    def _check_call(
        self, walk: _Walk, number: int, hidden_states: Any, given: Tensor, tokens: Tensor
    ) -> None:
        """Compares a block's call with the calls before; `given`: what the last of them gave."""
        if number in walk.arguments:
            raise self._refusal(
                f"a forward of {self.kind} calls block {number} more than once, and would need "
                "statistics of every time"
            )
        shape = getattr(hidden_states, "shape", None)
        if not walk.arguments:
            if shape is None or len(shape) != 3 or shape[:2] != tokens.shape:
                form = type(hidden_states).__name__ if shape is None else list(shape)
                raise self._refusal(
                    f"{self.kind} calls its blocks with hidden states of another form: {form} for "
                    f"{tokens.shape[0]} sequences of {tokens.shape[1]} tokens, where prox24 runs "
                    "blocks on (sequences, tokens, hidden)"
                )
            return
        if number < walk.last:
            order = ", ".join(map(str, [*walk.arguments, number]))
            raise self._refusal(f"{self.kind} calls its blocks in another order: {order}")
        if shape != given.shape:
            raise _Lost("a block is not called with what the one before returns")
        if hidden_states is given:
            return
        if hidden_states.dtype != given.dtype or not torch.equal(hidden_states, given):
            raise self._refusal(
                f"{self.kind} changes the hidden states between blocks {walk.last} and {number}"
            )

    @staticmethod
    def _refusal(text: str) -> ModelError:
        return ModelError(f"{text}{_REFUSED}")
