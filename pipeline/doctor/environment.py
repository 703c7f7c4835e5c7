"""The environment variables that change what a job does, without anything that may be secret."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import psutil

HIDDEN = "(set, not shown)"
"""Stands for the value of a variable that may hold a secret."""

_SHOWN = re.compile(
    r"(RAY|NCCL|GLOO|HF|HUGGINGFACE|TRANSFORMERS|CUDA|NVIDIA|CUBLAS|TORCH|PYTORCH|TRITON|OMP|MKL|"
    r"OPENBLAS|NUMBA|PYTHON|LD)_.*|PYTHON[A-Z]+|CC|TMPDIR|TOKENIZERS_PARALLELISM"
)
_SECRET_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|COOKIE|PRIVATE|SIGNATURE|API|KEY|AUTH(?!_MODE)"
)
# Ray's own, of a process that it has started; JSON of a runtime environment may hold variables.
_OF_RAY = re.compile(
    r"RAY_(JOB_.*|RAYLET_.*|NODE_.*|WORKER_.*|CLIENT_.*|LD_PRELOAD.*|RUNTIME_ENV.*)"
)
# Ray preloads it into its own processes.
_RAYS_LIBRARY = "ray/core/libjemalloc"
# A run of characters that is no word, number or address, as keys and tokens are. Names of folders
# may be long.
_RANDOM = re.compile(r"[A-Za-z0-9+_=-]{20,}")
_RANDOM_IN_PATH = re.compile(r"[A-Za-z0-9+_=-]{40,}")
# UUIDs of GPUs look like tokens.
_DEVICES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")


def started_with() -> dict[str, str]:
    """The variables that this process was started with, without those that it has set itself."""
    try:
        return psutil.Process().environ()
    except (psutil.Error, OSError):
        return dict(os.environ)


def shown_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables to show, by name; of those that may hold a secret the name alone."""
    return {
        name: HIDDEN if may_be_secret(name, value) else value
        for name, value in sorted(variables.items())
        if _SHOWN.fullmatch(name) and not _OF_RAY.fullmatch(name) and _RAYS_LIBRARY not in value
    }


def may_be_secret(name: str, value: str) -> bool:
    """Whether the name speaks of a secret, or the value looks like one.

    A URL with a user, JSON, and a long run of letters with digits count; rather one too many.
    """
    if _SECRET_NAME.search(name.upper()):
        return True
    if name in _DEVICES:
        return False
    if "@" in value or "{" in value or "hf_" in value.lower():
        return True
    return any(
        any(c.isdigit() for c in run) and any(c.isalpha() for c in run)
        for run in (_RANDOM_IN_PATH if "/" in value else _RANDOM).findall(value)
    )
