"""A run directory: its layout, lock, checkpoints, activations and saved layers."""
