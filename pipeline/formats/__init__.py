"""Checkpoints in few bits: which stored tensors make one weight, and how it is dequantized."""
