"""A rank's part in the reconstruction of a block."""
