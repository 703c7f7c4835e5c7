"""Checkpoints in few bits: which stored tensors a weight is computed from, and how."""
