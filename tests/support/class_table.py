"""The table of roles: of every class, what of a block of each kind is pruned, and what stays dense.

`python -m tests.support.class_table` writes tests/models/classes.json again. Whoever does it reads
the difference line by line: no router, embedding or head is pruned, and no projection stays dense
without a word.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers

from pipeline.config.layers import LayerOptions, LayerRules
from pipeline.config.solver import SolverSettings
from pipeline.models.linears import dense_weights, linear_layers
from pipeline.models.selection import check_structure
from pipeline.planning.shapes.model import shape_of
from pipeline.planning.shapes.source import open_source
from storage.errors import Prox24Error
from tests.support.class_models import FAMILIES, class_config

PATH = Path(__file__).parents[1] / "models" / "classes.json"
_EXPERT = re.compile(r"\bexperts\.\d+\.")
# What is written of an error depends on the folder and on sizes; the reason does not.
_FOLDER = re.compile(r"\S*prox24-class-[^\s:]*(: )?")


def table(model_types: Iterable[str]) -> dict[str, dict[str, Any]]:
    """model_type -> its class and the kinds of its blocks, or why there are none."""
    return {kind: {"class": FAMILIES[kind], **_entry(kind)} for kind in model_types}


def _entry(model_type: str) -> dict[str, Any]:
    try:
        config = class_config(model_type)
    except Exception as error:
        return {"not made": _line(error)}
    with tempfile.TemporaryDirectory(prefix="prox24-class-") as folder:
        config.save_pretrained(folder)
        try:
            return _looked_at(Path(folder) / "config.json")
        except Prox24Error as error:
            made = "transformers cannot build" not in str(error)
            return {"refused" if made else "not made": _line(error)}
        except Exception as error:
            return {"FAILS": _line(error)}


def _looked_at(path: Path) -> dict[str, Any]:
    rules = LayerRules(settings=SolverSettings(), options=LayerOptions(skip_unsupported=True))
    source = open_source(path, "float32", False)
    skeleton = source.skeleton
    check_structure(skeleton)
    kinds: list[dict[str, Any]] = []
    for block in skeleton.blocks:
        kind = {
            "pruned": " ".join(dict.fromkeys(map(_collapsed, linear_layers(block)))),
            "dense": _by_reason(dense_weights(block)),
        }
        if kind not in kinds:
            kinds.append(kind)
    shape = shape_of(
        *(skeleton,), name="x", files=(), itemsize=4, seqlen=16, rules=rules, all_experts=False
    )
    if shape.unsupported:
        return {"refused": shape.unsupported}
    return {"blocks": kinds}


def _by_reason(dense: dict[str, str]) -> dict[str, str]:
    found: dict[str, dict[str, None]] = {}
    for name, reason in dense.items():
        found.setdefault(reason, {})[_collapsed(name)] = None
    return {reason: " ".join(names) for reason, names in found.items()}


def _collapsed(name: str) -> str:
    return _EXPERT.sub("experts.*.", name)


def _line(error: Exception) -> str:
    text = _FOLDER.sub("", " ".join(str(error).split()) or type(error).__name__)
    return text if len(text) <= 240 else text[:239] + "…"


def main() -> None:
    """Writes the table of all classes, or prints that of the ones that are named."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    if sys.argv[1:]:
        print(json.dumps(table(sys.argv[1:]), indent=1, ensure_ascii=False))
        return
    text = json.dumps(table(FAMILIES), indent=1, ensure_ascii=False)
    PATH.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
