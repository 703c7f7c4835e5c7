"""Runs a probe in a process of its own: one that hangs, crashes or cannot import ends alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.doctor.facts import Answer

MARK = "prox24-probe:"
"""Begins the line of the answer: libraries print, too."""

_REAP_SECONDS = 1.0
_MOST_CHARACTERS = 400


def run_probe(
    name: str, arguments: Mapping[str, Any], seconds: float, environment: Mapping[str, str]
) -> Answer:
    """The answer of `pipeline.doctor.probes.PROBES[name]`, given `arguments` (JSON values).

    seconds: after which it is killed. environment: of its process, which finds modules where this
    process does. Never raises for what a probe does.
    """
    command = [sys.executable, "-m", "pipeline.doctor.probes", name, json.dumps(arguments)]
    path = os.pathsep.join(part or os.getcwd() for part in sys.path)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**environment, "PYTHONPATH": path},
            start_new_session=True,
        )
    except OSError as error:
        return Answer(problem=f"no process can be started: {error}")
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        # One that is stuck in the kernel outlives even that: it is not waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_REAP_SECONDS)
        return Answer(problem=f"no answer in {seconds:g} s", hung=True)
    answers = [line for line in output.splitlines() if line.startswith(MARK)]
    if answers:
        value: dict[str, Any] = json.loads(answers[-1].removeprefix(MARK))
        return Answer(value)
    return Answer(problem=_last_words(errors, process.returncode))


def run_probes(
    names: Sequence[str],
    arguments: Mapping[str, Mapping[str, Any]],
    seconds: float,
    environment: Mapping[str, str],
) -> dict[str, Answer]:
    """The answers of several probes at once, by name."""
    with ThreadPoolExecutor(len(names)) as pool:
        answers = pool.map(
            lambda name: run_probe(name, arguments.get(name, {}), seconds, environment), names
        )
        return dict(zip(names, answers, strict=True))


def _last_words(errors: str, status: int) -> str:
    """Why a process ended without an answer: its last line, and its signal."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    words = (lines or ["no message"])[-1][:_MOST_CHARACTERS]
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-status).name} ({words})"
    return words
