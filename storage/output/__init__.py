"""Writes the pruned model's files to a folder or an object store."""
