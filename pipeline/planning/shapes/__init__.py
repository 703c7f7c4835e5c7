"""A model's blocks, groups and layers as shapes, read from its config and headers."""
