"""The shapes of a model's blocks, groups and layers, from its config and file headers."""
