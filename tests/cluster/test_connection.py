"""What is sent to a cluster's nodes, so that they run the driver's own prox24."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.dispatch.connection import code_to_send

VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def test_the_four_packages_of_this_driver(repository: Path) -> None:
    sent = code_to_send({})
    assert sent is not None
    folders = [repository / name for name in ("storage", "pipeline", "actors", "cluster")]
    assert sent["py_modules"] == [str(folder) for folder in folders]


@pytest.mark.parametrize(
    "runtime_env", [{"working_dir": "gcs://x.zip"}, {"py_modules": ["gcs://y.zip"]}]
)
def test_a_job_that_brings_its_code_keeps_it(runtime_env: dict[str, object]) -> None:
    assert code_to_send({VARIABLE: json.dumps({"runtime_env": runtime_env})}) is None


@pytest.mark.parametrize("said", ["", "{}", '{"runtime_env": {"env_vars": {"A": "b"}}}', "[", "7"])
def test_a_job_that_brings_none_is_sent_ours(said: str) -> None:
    assert code_to_send({VARIABLE: said}) is not None
