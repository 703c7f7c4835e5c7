"""The table of roles of every class: it changes only where somebody has read the change."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.class_models import FAMILIES
from tests.support.class_table import PATH, table

# One of each kind: dense, routers of several forms, shared experts, hybrids, refused ones.
SAMPLE = (
    "llama",
    "hunyuan_v1_moe",
    "afmoe",
    "phimoe",
    "qwen3_next",
    "granitemoehybrid",
    "nemotron_h",
    "lfm2_moe",
    "jamba",
    "recurrent_gemma",
    "dbrx",
)
READ_IT = (
    "the roles of a class's layers changed: `python -m tests.support.class_table` writes the table "
    "again, and the difference is to be read line by line"
)


@pytest.fixture(scope="module")
def committed() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(PATH.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("kind", SAMPLE)
def test_the_roles_of_a_class_are_those_in_the_table(
    committed: dict[str, dict[str, Any]], kind: str
) -> None:
    assert table([kind])[kind] == committed[kind], READ_IT


@pytest.mark.slow
def test_the_table_has_every_class(committed: dict[str, dict[str, Any]]) -> None:
    assert table(FAMILIES) == committed, READ_IT


def test_no_router_head_or_embedding_is_pruned(committed: dict[str, dict[str, Any]]) -> None:
    """By the names that the classes give them, which roles are not read from."""
    for kind, entry in committed.items():
        for block in entry.get("blocks", ()):
            for name in block["pruned"].split():
                last = name.rpartition(".")[2]
                assert last not in {"gate", "wg", "router", "classifier"}, (kind, name)
                assert "router" not in name.split("."), (kind, name)
                assert not any(part in name for part in ("embed", "lm_head", "norm.weight")), name
