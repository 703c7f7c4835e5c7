"""Layer-wise pruning. All are pure functions of tensors: no files, devices, clocks or logging.

`registry.solver_for(settings)` gives a method's solver. `methods/` holds the methods, one file
each; `base` what they share; `kernels/` their inner loops for numba, Triton and plain torch.
Importing this package imports nothing.
"""
