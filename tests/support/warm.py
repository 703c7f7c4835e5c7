"""Imported by the fork server: a job is run once, so that every fork finds what it needs loaded.

transformers imports a model family when it is first used, torch and numba set themselves up at
their first call: two seconds that every process would spend again.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from tests.support.jobs import prune_here
from tests.support.tiny_models import save_tiny_model

# A pool of threads would not survive the fork.
assert os.environ.get("OMP_NUM_THREADS") == "1"
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    prune_here(
        save_tiny_model(Path(folder, "model"), blocks=1), Path(folder, "output"), shrinkage="auto"
    )
