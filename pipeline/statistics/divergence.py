"""Divergences between two models' next-token distributions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Positions computed at once: a distribution over 128,256 tokens takes half a megabyte in fp32, and
# about six are in memory per position.
_POSITIONS = 128


def divergences(reference: Tensor, other: Tensor) -> tuple[float, float, int]:
    """(JS, KL, equal): sums of the divergences over positions, and equal most likely tokens.

    reference, other: logits (T, V) of any float dtype, of the distributions P and Q. In nats,
    computed in fp32 and summed in float64: KL(P || Q), and JS = (KL(P || M) + KL(Q || M)) / 2 with
    M = (P + Q) / 2 (Lin, 1991, "Divergence measures based on the Shannon entropy"), which is
    symmetric and at most ln 2.
    """
    jensen_shannon = kullback_leibler = 0.0
    same = 0
    for start in range(0, reference.shape[0], _POSITIONS):
        p = nn.functional.log_softmax(reference[start : start + _POSITIONS].float(), dim=-1)
        q = nn.functional.log_softmax(other[start : start + _POSITIONS].float(), dim=-1)
        same += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        middle = torch.logaddexp(p, q).sub_(torch.log(torch.tensor(2.0)))
        kullback_leibler += _relative_entropy(p, q)
        jensen_shannon += (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2
    return jensen_shannon, kullback_leibler, same


def _relative_entropy(p: Tensor, q: Tensor) -> float:
    """Sum over rows of KL(P || Q). p, q: log-probabilities (T, V); 0 · log 0 counts as 0."""
    terms = p.exp() * (p - q)
    terms = torch.where(p == -torch.inf, torch.zeros_like(terms), terms)
    # Nonnegative by Gibbs' inequality: anything below 0 is rounding.
    return float(terms.sum(dim=-1).double().clamp(min=0).sum())
