"""The schema numbers of the JSON files that this folder reads and writes.

A change of a file's form raises its number; a reader refuses all other numbers. The numbers of
files that `storage` reads and writes are in `storage`: that of block records in
`storage.run.directory`, those of the lock, the status and the uploads beside their writers.
"""

MANIFEST_SCHEMA = 1
"""`run.json`."""
ACTIVATIONS_SCHEMA = 1
"""`activations/block-N/record.json` and `report/inputs-N.json`."""
CHOICES_SCHEMA = 1
"""`choices/block-N.json`."""
SUMMARY_SCHEMA = 1
"""`report/summary.json`."""
EVALUATION_SCHEMA = 1
"""`report/evaluation.json`."""
SCRATCH_SCHEMA = 1
"""`scratch.json`, and `place.json` on each node's scratch."""
