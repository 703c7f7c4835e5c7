"""Layer-wise pruning: pure functions of tensors, without files, clocks or logging.

`registry.solver_for(settings)` returns the solver of a method. `methods/` has one file per method,
`base` what they share, `kernels/` their inner loops in numba, Triton and plain torch.
Importing this package imports nothing else.
"""
