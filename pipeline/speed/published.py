"""Speed-ups that were published, to hold our own against."""

from __future__ import annotations

PUBLISHED_BATCHES = (8192, 16384, 32768)
"""Batch sizes of the figures below, in tokens."""

A100: dict[tuple[int, int], tuple[float, float, float]] = {
    (6144, 4096): (0.92, 1.22, 1.32),
    (4096, 4096): (0.75, 1.08, 1.26),
    (28672, 4096): (0.83, 0.90, 0.88),
    (4096, 14336): (1.29, 1.51, 1.52),
    (10240, 8192): (1.28, 1.41, 1.47),
    (8192, 8192): (1.26, 1.43, 1.44),
    (57344, 8192): (0.91, 0.90, 0.93),
    (8192, 28672): (1.53, 1.61, 1.53),
}
"""Weight (R, C) -> 2:4 over dense, A100, fp16, `torch.sparse.to_sparse_semi_structured`: qkv, o,
up+gate and down of Llama-3.1-8B, then of 70B (Kübler et al., "A Proximal Operator for Inducing
2:4-Sparsity"). At batch sizes of 1 to 32 they state 0.05 to 0.56."""
