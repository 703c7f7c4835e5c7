"""The files that prox24 reads and writes. Knows nothing of Ray, models' layers or solvers.

`errors`        the exception tree of the whole project
`object_store`  folders in object stores (s3://, gs://): ranged reads, uploads
`files`         the commit protocol: durable and create-if-absent writes, hashes, checked JSON
`model`         the source model: headers and single tensors without loading it, fingerprints
`run`           a run directory: the lock, checkpoints, activation shards, saved layers
`output`        the pruned model, written in the source's layout, to a disk or an object store
"""
