"""The options of block reconstruction: the training of a block's kept weights after its solve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.fields import option, require
from storage.errors import ConfigError

Reconstruction = Literal["auto", "none", "block"]
Target = Literal["dense-chain", "dense-block"]
MaskRule = Literal["fixed", "exchange"]

LEAST_SEQUENCES = 2
"""Of a calibration: one to learn from, one to judge."""


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """How blocks are reconstructed: the options, for workers and plans.

    epochs: at most. batch: sequences of a step. seed: of the order of the sequences. exchange:
    whether weights may change places. dense_chain: whether the targets are the dense model's own
    activations. norms: whether the block's norms are trained too.
    """

    epochs: int
    batch: int
    learning_rate: float
    seed: int
    exchange: bool
    dense_chain: bool
    norms: bool = False


def default_batch(nsamples: int) -> int:
    """Sequences of a step: about sixteen steps an epoch, so that few sequences still give many.

    It does not depend on the number of workers, which would change the result.
    """
    batch = 1
    while batch < 16 and 32 * batch <= nsamples:
        batch *= 2
    return batch


def default_epochs(nsamples: int) -> int:
    """Epochs at most: 8, and up to 16 where fewer than 64 sequences give few steps."""
    return min(16, max(8, 512 // max(nsamples, 1)))


def unless_reconstructed(config: Any) -> str | None:
    """The condition of the options of the reconstruction."""
    if config.reconstructs():
        return None
    if config.reconstruct == "none":
        return "with --reconstruct none blocks are not reconstructed"
    why: str | None = config.left_out()
    return why or "--reconstruct auto leaves this method's blocks as they are (--reconstruct block)"


@dataclass(frozen=True, kw_only=True)
class ReconstructOptions:
    """Whether and how each block is trained after its layers are solved; see docs/methods.md.

    Raises `ConfigError` for a value out of range.
    """

    reconstruct: Reconstruction = option(
        "auto",
        "after a block's layers are solved, train its kept weights so that the block's output is "
        "that of the dense model: `block`, `none`, or `auto`: for method prox_admm",
    )
    reconstruct_epochs: int | None = option(
        None,
        "passes over the calibration sequences in a block's reconstruction, at most; unset: 512 "
        "divided by --nsamples, 8 to 16",
        unused=unless_reconstructed,
    )
    reconstruct_batch: int | None = option(
        None,
        "sequences in one step of the reconstruction; unset: a sixteenth of --nsamples, rounded "
        "down to a power of two, 1 to 16",
        unused=unless_reconstructed,
    )
    reconstruct_lr: float = option(
        16e-3,
        "first learning rate of the reconstruction, as a share of the root mean square of a "
        "layer's kept weights",
        unused=unless_reconstructed,
    )
    reconstruct_target: Target = option(
        "dense-chain",
        "what a reconstructed block's output is compared with: that of the dense model at this "
        "depth (`dense-chain`), or of the dense block for the same inputs (`dense-block`)",
        unused=unless_reconstructed,
    )
    reconstruct_mask: MaskRule = option(
        "exchange",
        "`exchange`: weights may change places in the first 60 % of the reconstruction's steps; "
        "`fixed`: it keeps the solved mask",
        unused=unless_reconstructed,
    )
    reconstruct_norms: bool = option(
        False,
        "the reconstruction trains the weights and biases of a block's norms too",
        unused=unless_reconstructed,
    )

    def __post_init__(self) -> None:
        for name in ("reconstruct_epochs", "reconstruct_batch"):
            require(self, name, at_least=1)
        if not 0 < self.reconstruct_lr < math.inf:
            raise ConfigError(f"--reconstruct-lr must be above 0, not {self.reconstruct_lr}")
        if self.reconstruct == "block" and (why := self.too_few_sequences()) is not None:
            raise ConfigError(f"--reconstruct block: {why}")

    def too_few_sequences(self) -> str | None:
        """Why the calibration cannot be divided in what is learned from and what judges, or None.

        The config with these options says how many sequences there are.
        """
        count = getattr(self, "nsamples", LEAST_SEQUENCES)
        if count >= LEAST_SEQUENCES:
            return None
        return (
            "some calibration sequences judge and the others are learned from: --nsamples must be "
            f"at least {LEAST_SEQUENCES}, not {count}"
        )

    def left_out(self) -> str | None:
        """Why `auto` leaves blocks as they are that it would reconstruct; None if it does not."""
        if self.reconstruct != "auto" or not self._suits():
            return None
        why = self.too_few_sequences()
        return None if why is None else f"--reconstruct auto leaves blocks as they are: {why}"

    def reconstructs(self) -> bool:
        """Whether blocks are reconstructed, with the method that these options go with."""
        if self.reconstruct == "auto":
            return self._suits() and self.too_few_sequences() is None
        return self.reconstruct == "block"

    def _suits(self) -> bool:
        """Whether the method is one that `auto` reconstructs after."""
        return getattr(self, "method", None) == "prox_admm"

    def reconstruction(self, nsamples: int, seed: int = 0) -> Reconstruct | None:
        """How blocks are reconstructed on so many sequences; None where they are not."""
        if not self.reconstructs():
            return None
        return Reconstruct(
            epochs=self.reconstruct_epochs or default_epochs(nsamples),
            batch=self.reconstruct_batch or default_batch(nsamples),
            learning_rate=self.reconstruct_lr,
            seed=seed,
            exchange=self.reconstruct_mask == "exchange",
            dense_chain=self.reconstruct_target == "dense-chain",
            norms=self.reconstruct_norms,
        )
