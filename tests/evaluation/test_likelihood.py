"""Likelihoods of continuations: requests as sequences, and that they are transformers' own."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.evaluate import EvalConfig
from pipeline.evaluation.likelihood import batches, log_likelihoods, longest_sequence
from pipeline.messages import Target
from pipeline.models.skeleton import open_skeleton
from pipeline.runtime.progress import Silent
from pipeline.worker.local_executor import LocalExecutor
from storage.errors import ConfigError
from tests.support.tiny_models import save_tiny_model


def test_requests_become_sequences_by_width() -> None:
    long = tuple(range(100, 140))
    requests = [
        ((1, 2, 3), (4, 5)),
        (long, (7,)),
        ((1, 2), (3,)),
        ((1, 2), (9,)),
        ((5,) * 16, (6,)),
    ]
    narrow, wide = batches(requests, longest=4096)
    assert (narrow.width, wide.width) == (16, 64)
    # The last token of a continuation is asked for, not fed; one sequence serves both of (1, 2).
    assert narrow.sequences == ((1, 2, 3, 4), (1, 2), (5,) * 16)
    assert narrow.asked == (
        ((0, Target(2, (4, 5))),),
        ((2, Target(1, (3,))), (3, Target(1, (9,)))),
        ((4, Target(15, (6,))),),
    )
    assert wide.sequences == (long,)
    # What is too long loses its beginning, and no sequence is longer than the model allows.
    (cut,) = batches([(long, (7, 8))], longest=30)
    assert (cut.width, cut.sequences) == (30, ((*long, 7)[-30:],))
    assert cut.asked == (((0, Target(28, (7, 8))),),)


@pytest.mark.parametrize("request_", [((), (1,)), ((1,), ()), ((1,), (1,) * 9)])
def test_requests_that_cannot_be_scored(request_: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match="request 0"):
        batches([request_], longest=8)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_likelihoods_are_transformers_own(tmp_path: Path, architecture: str) -> None:
    """One request at a time in the whole model, without padding; some too long for it."""
    folder = save_tiny_model(tmp_path / "model", architecture, positions=48)
    draw = random.Random(0)
    requests = [
        (draw.choices(range(256), k=context), draw.choices(range(256), k=size))
        for context, size in ((9, 1), (40, 1), (1, 2), (30, 3), (47, 2), (60, 13), (45, 40))
    ]
    # One that the model itself would say: the only kind that is greedy.
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    likely = int(whole(torch.tensor([requests[0][0]])).logits[0, -1].argmax())
    requests.append((requests[0][0], [likely]))
    skeleton = open_skeleton(folder, dtype="float32", trust_remote_code=False)
    assert longest_sequence(skeleton) == 48
    config = EvalConfig(executor="local", threads=1, dtype="float32", batch_size=2)
    found = log_likelihoods(requests, skeleton, config, LocalExecutor(2, 1), Silent())
    assert [greedy for _, greedy in found].index(True) == len(requests) - 1
    for (context, continuation), (value, greedy) in zip(requests, found, strict=True):
        fed = torch.tensor([[*context, *continuation][-49:-1]])
        logits = whole(fed).logits[0, -len(continuation) :].log_softmax(-1)
        expected = sum(float(row[token]) for row, token in zip(logits, continuation, strict=True))
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == continuation)
