"""Published speed-ups, to compare measured ones with."""

from __future__ import annotations

PUBLISHED_BATCHES = (8192, 16384, 32768)
"""Batch sizes of the speed-ups below, in tokens."""

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
"""Weight (R, C) -> speed-up of 2:4 over dense, on an A100, fp16, with
`torch.sparse.to_sparse_semi_structured`: qkv, o, up+gate and down of Llama-3.1-8B, then of 70B.
Source: Kübler et al., "A Proximal Operator for Inducing 2:4-Sparsity", which also reports 0.05 to
0.56 at batch sizes of 1 to 32."""
