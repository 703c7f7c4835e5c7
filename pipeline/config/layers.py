"""Which layers of a model are pruned, and with which settings: by names, blocks and overrides.

A layer's name is its module's path in the model, `model.layers.3.mlp.down_proj`. The rules depend
only on names and shapes, so they apply before any compute and are the same on every rank.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.config.fields import option, require
from pipeline.config.methods import METHODS
from pipeline.config.pattern import Pattern
from pipeline.config.solver import SolverSettings, unless_calibrated
from storage.errors import ConfigError

DENSE = "dense"
NO_EXPERTS = "no layer that is pruned is an expert's"


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """The options that select the layers to prune, and other settings for some of them.

    Raises `ConfigError` for a value that cannot be parsed.
    """

    include: str | None = option(
        None,
        "regular expression of the layers to prune, matched with their whole names "
        "(`.*\\.mlp\\..*`); unset: all linear layers of the blocks",
    )
    exclude: str | None = option(
        None, "regular expression of layers to leave dense (`lm_head|.*router.*`)"
    )
    blocks: str | None = option(
        None, "blocks to prune, from 0, as in 4-27 or 0,2,8-; the others stay dense; unset: all"
    )
    dense_first: int = option(0, "number of first blocks to leave dense")
    dense_last: int = option(0, "number of last blocks to leave dense")
    override: str | None = option(
        None,
        "`GLOB=METHOD`, `GLOB=PATTERN`, `GLOB=METHOD,PATTERN` or `GLOB=dense`, for layers whose "
        "whole name matches (`*.down_proj=wanda`); several with `;` between or by giving the "
        "option again; the last that matches counts",
        repeated=";",
    )
    skip_unsupported: bool = option(
        False, "leave linears whose width the pattern does not divide dense, and list them"
    )

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            _expression(name, getattr(self, name))
        parse_blocks(self.blocks)
        parse_overrides(self.override)
        require(self, "dense_first", at_least=0)
        require(self, "dense_last", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """The options of mixtures of experts. Raises `ConfigError` for a value out of range."""

    expert_tokens: int = option(
        16,
        "mixtures of experts: fewest calibration tokens sent to an expert for --method to be used; "
        "with fewer it is pruned by wanda, with none by the size of its weights, and listed",
        unused=unless_calibrated,
        of_model="experts",
    )
    calibrate_all_experts: bool = option(
        False,
        "mixtures of experts: take every expert's statistics of all tokens, not of those that it "
        "is sent; the model's outputs stay the routed ones",
        unused=unless_calibrated,
        of_model="experts",
    )

    def __post_init__(self) -> None:
        require(self, "expert_tokens", at_least=0)


class Override(NamedTuple):
    """One part of `--override`, for the layers whose names `glob` matches.

    method, pattern: None for those of the other layers. dense: the layers are not pruned.
    """

    glob: str
    method: str | None
    pattern: str | None
    dense: bool


class Choice(NamedTuple):
    """The settings of a layer, or the reason why it stays dense; the other one is None."""

    settings: SolverSettings | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class LayerRules:
    """The rules that the options define.

    settings: of layers that no override matches. overrides: (glob, settings), None for dense; the
    last that matches applies.
    """

    settings: SolverSettings
    overrides: tuple[tuple[str, SolverSettings | None], ...] = ()
    options: LayerOptions = field(default_factory=LayerOptions)

    def all_settings(self) -> list[SolverSettings]:
        """All settings that a layer may have."""
        return [self.settings, *(s for _, s in self.overrides if s is not None)]

    def choose(self, name: str, block: int, blocks: int, columns: int) -> Choice:
        """The settings of the linear layer `name`, with C = `columns`, in block `block`.

        blocks: the number of blocks. Raises `ConfigError` if the pattern does not divide the width
        and --skip-unsupported is not given.
        """
        reason = self._dense_because(name, block, blocks)
        settings: SolverSettings | None = self.settings
        override_reason = None
        for glob, override in self.overrides:
            if fnmatch.fnmatchcase(name, glob):
                settings, override_reason = override, f"--override {glob}={DENSE}"
        if reason is not None or settings is None:
            return Choice(None, reason or override_reason)
        try:
            Pattern.parse(settings.pattern).check_columns(columns)
        except ConfigError as error:
            if self.options.skip_unsupported:
                return Choice(None, f"--skip-unsupported: {error}")
            raise ConfigError(
                f"{name}: {error}; --skip-unsupported leaves such layers dense"
            ) from error
        return Choice(settings, None)

    def _dense_because(self, name: str, block: int, blocks: int) -> str | None:
        """The option by which a layer stays dense; None if it is pruned."""
        options = self.options
        ranges = parse_blocks(options.blocks)
        if ranges is not None and not any(block in part for part in ranges):
            return f"not in --blocks {options.blocks}"
        if block < options.dense_first:
            return f"--dense-first {options.dense_first}"
        if block >= blocks - options.dense_last:
            return f"--dense-last {options.dense_last}"
        if options.include is not None and not re.fullmatch(options.include, name):
            return f"not in --include {options.include}"
        if options.exclude is not None and re.fullmatch(options.exclude, name):
            return f"--exclude {options.exclude}"
        return None

    def check(self, layers: Iterable[str], modules: Iterable[str], blocks: int) -> None:
        """Raises `ConfigError` for an option that matches nothing in the model: a likely typo.

        layers: names of all linears of the blocks; modules: names of all modules of the model.
        """
        options, layers, modules = self.options, list(layers), list(modules)
        for part in parse_blocks(options.blocks) or ():
            last = part.start if part.stop == ALL_BLOCKS else part.stop - 1
            if last >= blocks:
                raise ConfigError(
                    f"--blocks {options.blocks}: the model has {blocks} blocks, numbered from 0"
                )
        for option_name, names in (("include", layers), ("exclude", modules)):
            expression = getattr(options, option_name)
            if expression is not None and not any(re.fullmatch(expression, n) for n in names):
                raise ConfigError(
                    f"--{option_name} {expression} matches no layer's whole name; they are like "
                    f"{layers[0] if layers else 'none'}"
                )
        for glob, _ in self.overrides:
            if not fnmatch.filter(layers, glob):
                raise ConfigError(
                    f"--override {glob}=... matches no layer's whole name; they are like "
                    f"{layers[0] if layers else 'none'}"
                )


ALL_BLOCKS = 2**31
"""End of an open range of blocks."""


def parse_blocks(text: str | None) -> tuple[range, ...] | None:
    """`4-27`, `0,2,8-` as ranges of block numbers; None for None. Raises `ConfigError`."""
    if text is None:
        return None
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:(-)\s*(\d{1,6})?\s*)?", part)
        if match is None:
            raise ConfigError(f"--blocks {text!r}: give numbers and ranges, as in 4-27 or 0,2,8-")
        first = int(match[1])
        stop = first + 1
        if match[2]:
            stop = int(match[3]) + 1 if match[3] else ALL_BLOCKS
        if stop <= first:
            raise ConfigError(f"--blocks {text!r}: {part.strip()} ends before it begins")
        ranges.append(range(first, stop))
    return tuple(ranges)


def parse_overrides(text: str | None) -> tuple[Override, ...]:
    """The parts of `--override`, in their order. Raises `ConfigError`."""
    overrides = []
    for part in filter(None, (part.strip() for part in (text or "").split(";"))):
        glob, equals, value = (piece.strip() for piece in part.rpartition("="))
        words = [word.strip() for word in value.split(",")]
        method = next((word for word in words if word in METHODS), None)
        pattern = next((word for word in words if ":" in word), None)
        dense = words == [DENSE]
        if (
            not glob
            or not equals
            or (len(words) != (method is not None) + (pattern is not None) and not dense)
        ):
            raise ConfigError(
                f"--override {part!r}: give GLOB=METHOD, GLOB=PATTERN, GLOB=METHOD,PATTERN or "
                f"GLOB={DENSE}, as in *.down_proj=wanda; methods are {', '.join(METHODS)}"
            )
        if pattern is not None:
            Pattern.parse(pattern)
        overrides.append(Override(glob, method, pattern, dense))
    return tuple(overrides)


def _expression(name: str, text: str | None) -> None:
    try:
        re.compile(text or "")
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"--{name} {text!r} is not a regular expression: {error}") from error
