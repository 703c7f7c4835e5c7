"""What is computed, free of Ray. `prune` is the whole job: read it first.

A folder may import only folders above it in this list; `tests/test_imports.py` has the same list.

`config`      options: one dataclass a command, one field an option; needs no torch
`runtime`     devices, threads, clocks, free memory, dividing work
`text`        text to sequences of tokens
`solvers`     weight and statistics to pruned weight; the methods, one file each
`reconstruct` training of a block's kept weights: gradients, steps, their order
`formats`     checkpoints in few bits, seen as bfloat16
`models`      a transformers model as blocks of linear layers, without its weights
`statistics`  second moments of layers' inputs
`messages`    what passes between the driver and its ranks
`records`     the JSON files of a run directory
`loop`        the order of blocks, retries, repair, and the `Executor` protocol
`output`      the pruned model's folder, its card, its verification
`worker`      one rank: what it does in each phase; the executor without Ray
`planning`    what a job will take
`preflight`   what is checked before compute
`doctor`      what is right and wrong with the nodes: `prox24 doctor`
`evaluation`  perplexity, likelihoods, tasks
`reporting`   the report and comparisons of finished jobs
`speed`       2:4 products on a GPU
`sweep`       many settings of one model
"""
