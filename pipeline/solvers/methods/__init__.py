"""The pruning methods, one file each: see `docs/extending.md`. Importing this imports nothing."""
