"""What prox24 keeps on disk, and nothing else.

`errors`              the exception tree of the whole project
`commit`              hashing, durable and create-if-absent writes: the commit protocol
`mending`             whether a committed file is still as it was written
`checked_json`        JSON records that carry their own checksum and a schema version
`lock`                one driver at a time on a run directory
`safetensors_format`  headers and dtype names of safetensors files
`object_store`        folders in object stores (s3://, gs://): ranged reads, uploads
`model_folder`        a model's files where they are, on a disk or in an object store
`model_files`         the source model: single tensors without loading it, fingerprints
`arrow_store`         activation shards and calibration tokens as Arrow IPC files
`checkpoints`         row slices of pruned layers, and the record that commits a block
`run_directory`       where everything of one job lies
`shared_folders`      whether every node sees the same folders: marker files
`status_file`         what a job is doing, for people who look in from outside
`output`              the pruned model, written in the source's own layout
`uploads`             an output in an object store: what was sent, and what makes it whole

Nothing here knows about Ray, models or solvers.
"""
