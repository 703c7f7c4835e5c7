"""What a rank does with the last block's outputs: losses, and distances from another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from pipeline.capture import ModelEnds
from pipeline.divergence import divergences
from pipeline.forward import Forward
from pipeline.model import open_skeleton
from storage.arrow_store import open_activation_shard
from storage.hashing import StoredFile
from storage.object_store import place
from storage.run_directory import RunDirectory


@dataclass(frozen=True)
class Reference:
    """The model to compare with: its location and forward dtype, and the outputs of its last block,
    stored in its run directory as the inputs of `block`, for the same sequences."""

    source: str
    dtype: str
    run_directory: str
    block: int
    shards: list[StoredFile]


@dataclass(frozen=True)
class SequenceDistance:
    """Sums over one sequence's predicted tokens: JS and KL in nats, equal most likely tokens."""

    jensen_shannon: float
    kullback_leibler: float
    same: int


def sequence_losses(
    forward: Forward, block: int, shards: Sequence[StoredFile] | Mapping[int, StoredFile]
) -> list[float]:
    """Summed next-token loss (nats) of each of this rank's sequences, in order.

    `shards` are the outputs of the last block, stored as the inputs of `block`.
    """
    with forward.watch("load"):
        ends = ModelEnds(forward.skeleton, forward.device, head=True)
    sums = []
    for _, start, hidden_states in forward.own_batches(block, shards, batch_size=1):
        tokens = forward.tokens()[start][None].to(forward.device)
        with forward.watch("forward"):
            logits = ends.logits(tokens, hidden_states)
            loss = nn.functional.cross_entropy(
                logits[0, :-1].float(), tokens[0, 1:], reduction="none"
            )
            sums.append(float(loss.double().sum()))
    return sums


def sequence_distances(
    forward: Forward,
    block: int,
    shards: Sequence[StoredFile] | Mapping[int, StoredFile],
    reference: Reference,
    trust_remote_code: bool,
) -> list[SequenceDistance]:
    """How far this model's next tokens are from the reference's, of each of this rank's sequences.

    Both models' ends are held at once, their blocks are not needed any more.
    """
    with forward.watch("load"):
        ends = ModelEnds(forward.skeleton, forward.device, head=True)
        dense = open_skeleton(
            place(reference.source), dtype=reference.dtype, trust_remote_code=trust_remote_code
        )
        dense_ends = ModelEnds(dense, forward.device, head=True)
    folder = RunDirectory(Path(reference.run_directory)).activations(reference.block)
    found = []
    own = forward.own_batches(block, shards, batch_size=1)
    for index, (first, stop) in forward.own_shards():
        stored = reference.shards[index]
        with open_activation_shard(folder / stored.name, sha256=stored.sha256) as shard:
            for sequence in range(first, stop):
                _, start, hidden_states = next(own)
                tokens = forward.tokens()[start][None].to(forward.device)
                with forward.watch("io"):
                    at = sequence - first
                    dense_states = shard.read(at, at + 1).to(forward.device)
                with forward.watch("forward"):
                    sums = divergences(
                        dense_ends.logits(tokens, dense_states)[0, :-1],
                        ends.logits(tokens, hidden_states)[0, :-1],
                    )
                found.append(SequenceDistance(*sums))
    return found
