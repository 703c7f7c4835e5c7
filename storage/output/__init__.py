"""The pruned model's weight files, into a folder or an object store."""
