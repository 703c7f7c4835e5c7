"""The source model: its weight files, their headers and tensors, its side files."""
