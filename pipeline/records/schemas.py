"""The schema number of each JSON file that this folder reads and writes; a change of a file's form
raises its number, and a reader refuses every other.

Those of files that `storage` reads and writes stand there: block records in
`storage.run.directory`, the lock, the status and uploads beside their writers.
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
