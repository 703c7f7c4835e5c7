"""The pruning methods, one file each (`docs/extending.md`). Importing this imports nothing else."""
