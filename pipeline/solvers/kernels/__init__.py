"""Inner loops of solvers in numba, Triton and plain torch. Importing this imports nothing else."""
