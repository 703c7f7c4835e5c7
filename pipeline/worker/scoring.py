"""Scores of the last block's outputs: losses, likelihoods of given tokens, distances from another
model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pipeline.messages import Job, Reference, SequenceDistance, Target
from pipeline.models.forward_capture import ModelEnds
from pipeline.models.skeleton import open_skeleton
from pipeline.statistics.divergence import divergences
from pipeline.worker.forward import Forward, around_blocks
from storage.files.hashing import StoredFile
from storage.object_store import place
from storage.run.activations import open_activation_shard
from storage.run.directory import RunDirectory


class Scoring:
    """The scoring phases of a rank. They read the last block's outputs, stored as the inputs of
    `block`, the number after the last one."""

    job: Job
    forward: Forward

    def losses(self, block: int, shards: list[StoredFile]) -> list[float]:
        """Summed next-token loss of each of this rank's sequences: see `sequence_losses`."""
        return sequence_losses(self.forward, block, shards)

    def likelihoods(
        self, block: int, shards: list[StoredFile], targets: Sequence[Sequence[Target]]
    ) -> list[list[tuple[float, bool]]]:
        """Likelihoods of the targets of this rank's sequences: see `sequence_likelihoods`."""
        return sequence_likelihoods(self.forward, block, shards, targets)

    def distances(
        self, block: int, shards: list[StoredFile], reference: Reference
    ) -> list[SequenceDistance]:
        """Distances of this rank's sequences from another model: see `sequence_distances`."""
        trusted = self.job.trust_remote_code
        return sequence_distances(self.forward, block, shards, reference, trusted)


def sequence_likelihoods(
    forward: Forward,
    block: int,
    shards: Sequence[StoredFile] | Mapping[int, StoredFile],
    targets: Sequence[Sequence[Target]],
) -> list[list[tuple[float, bool]]]:
    """Per sequence of this rank, and per target: (log-likelihood in nats, all tokens most likely).

    targets: of all sequences, in order. Raises `NumericalError`, naming the module, for NaN.
    """
    with forward.watch("load"):
        ends = ModelEnds(forward.skeleton, forward.device, head=True)
    likelihoods = []
    for _, start, hidden_states in forward.rank_batches(block, shards, batch_size=1):
        tokens = forward.tokens()[start][None].to(forward.device)
        scores = []
        with forward.watch("forward"):
            logits = ends.logits(tokens, hidden_states)[0]
            for target in targets[start]:
                stop = target.position + len(target.tokens)
                logarithms = nn.functional.log_softmax(
                    logits[target.position : stop].float(), dim=-1
                )
                wanted = torch.tensor(target.tokens, device=forward.device)
                likely = logarithms.gather(1, wanted[:, None]).double().sum()
                scores.append((float(likely), bool((logarithms.argmax(dim=-1) == wanted).all())))
        if any(math.isnan(likelihood) for likelihood, _ in scores):
            run = partial(ends.logits, tokens, hidden_states)
            raise around_blocks(ends, run, f"the likelihoods of sequence {start}")
        likelihoods.append(scores)
    return likelihoods


def sequence_losses(
    forward: Forward, block: int, shards: Sequence[StoredFile] | Mapping[int, StoredFile]
) -> list[float]:
    """Summed next-token loss (nats) of each of this rank's sequences, in order.

    shards: the outputs of the last block, stored as the inputs of `block`. Raises
    `NumericalError`, naming the module, for NaN or Inf.
    """
    with forward.watch("load"):
        ends = ModelEnds(forward.skeleton, forward.device, head=True)
    sums = []
    for _, start, hidden_states in forward.rank_batches(block, shards, batch_size=1):
        tokens = forward.tokens()[start][None].to(forward.device)
        with forward.watch("forward"):
            logits = ends.logits(tokens, hidden_states)
            loss = nn.functional.cross_entropy(
                logits[0, :-1].float(), tokens[0, 1:], reduction="none"
            )
            sums.append(float(loss.double().sum()))
        if not math.isfinite(sums[-1]):
            run = partial(ends.logits, tokens, hidden_states)
            raise around_blocks(ends, run, f"the loss of sequence {start}")
    return sums


def sequence_distances(
    forward: Forward,
    block: int,
    shards: Sequence[StoredFile] | Mapping[int, StoredFile],
    reference: Reference,
    trust_remote_code: bool,
) -> list[SequenceDistance]:
    """Divergences of this model's next tokens from the reference's, per sequence of this rank.

    The embeddings and heads of both models are in memory at once; their blocks are not.
    """
    with forward.watch("load"):
        ends = ModelEnds(forward.skeleton, forward.device, head=True)
        dense = open_skeleton(
            place(reference.source), dtype=reference.dtype, trust_remote_code=trust_remote_code
        )
        dense_ends = ModelEnds(dense, forward.device, head=True)
    folder = RunDirectory(Path(reference.run_directory)).activations(reference.block)
    distances = []
    batches = forward.rank_batches(block, shards, batch_size=1)
    for index, (first, stop) in forward.rank_shards():
        stored = reference.shards[index]
        with open_activation_shard(folder / stored.name, sha256=stored.sha256) as shard:
            for sequence in range(first, stop):
                _, start, hidden_states = next(batches)
                tokens = forward.tokens()[start][None].to(forward.device)
                with forward.watch("io"):
                    at = sequence - first
                    dense_states = shard.read(at, at + 1).to(forward.device)
                with forward.watch("forward"):
                    sums = divergences(
                        dense_ends.logits(tokens, dense_states)[0, :-1],
                        ends.logits(tokens, hidden_states)[0, :-1],
                    )
                distances.append(SequenceDistance(*sums))
    return distances
