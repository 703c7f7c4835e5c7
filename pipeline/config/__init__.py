"""Options: one frozen dataclass per command, one field per option. Needs no torch.

`fields` declares options. `solver`, `layers` and `runtime` are groups of options that several
commands share; `prune`, `evaluate` and `solve` are whole commands. `methods` is the table of
pruning methods, `pattern` the sparsity patterns.
"""
