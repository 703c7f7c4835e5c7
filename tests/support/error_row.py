"""Command lines that must be refused, one for each kind of message: see test_error_kinds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from tests.support.refusals import LOCAL

JOB = f"{' '.join(LOCAL)} --nsamples 4"


@dataclass(frozen=True)
class Row:
    """A command line, and the message that it ends with.

    `{d}` is a folder of the test's own, `{model}` a good model in it and `{text}` a good text.
    module, says: where the message is made, and some of its fixed words.
    files: what is written into `{d}`. first: a command that must end well before. prepare: what
    else is done there, after it.
    """

    arguments: str
    module: str
    says: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    prepare: Callable[[Path], object] = lambda folder: None
    first: str = ""


def pruning(options: str, module: str, says: str, **more: Any) -> Row:
    data = "" if "--dataset" in options else "--dataset {text}"
    return Row(f"prune {{model}} {{d}}/out {JOB} {data} {options}", module, says, **more)


def reading(name: str, content: str | bytes, module: str, says: str, options: str = "") -> Row:
    command = f"--dataset {{d}}/{name} {options}"
    return pruning(command, f"pipeline/text/{module}", says, files={name: content})


def of_model(module: str, says: str, prepare: Callable[[Path], object]) -> Row:
    return pruning("", module, says, prepare=lambda folder: prepare(folder / "model"))


def of_config(module: str, says: str, **changes: object) -> Row:
    def prepare(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return of_model(module, says, prepare)


def sweeping(says: str, more: str, *, module: str = "pipeline/sweep/grid") -> Row:
    text = more if more.startswith("!") else f"model: {{d}}/model\nfolder: {{d}}/sweep\n{more}"
    return Row("sweep --config {d}/sweep.yaml", module, says, files={"sweep.yaml": text.strip("!")})


def solving(options: str, module: str, says: str, tensors: Callable[[], Any], **meta: str) -> Row:
    def prepare(folder: Path) -> None:
        save_file(tensors(), folder / "layer.safetensors", meta or None)

    command = f"solve {{d}}/layer.safetensors --threads 1 {options}"
    return Row(command, module, says, prepare=prepare)


def header(text: str) -> Callable[[Path], object]:
    """Writes a weight file of this header and no data."""
    data = text.encode()
    return lambda model: (model / "model.safetensors").write_bytes(
        len(data).to_bytes(8, "little") + data
    )


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def prepare(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return prepare


def index(text: str) -> Callable[[Path], object]:
    def prepare(model: Path) -> None:
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        (model / "model.safetensors.index.json").write_text(text)

    return prepare


def saved_text(state: str, info: str = "{}") -> Callable[[Path], object]:
    """A folder like one of `Dataset.save_to_disk`."""

    def prepare(folder: Path) -> None:
        (folder / "saved").mkdir()
        (folder / "saved" / "state.json").write_text(state)
        (folder / "saved" / "dataset_info.json").write_text(info)

    return prepare


def table(folder: Path) -> None:
    """A table without a text, and a Parquet file that is cut off."""
    pq.write_table(pa.table({"number": [1, 2]}), folder / "numbers.parquet")


def ones() -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(4, 8), "inputs": torch.randn(2, 8, 8)}


def without_output(folder: Path) -> None:
    shutil.rmtree(folder / "out")


GOOD = f"prune {{model}} {{d}}/out {JOB} --dataset {{text}} --no-report"
ROLE = json.dumps({"messages": [{"role": "judge", "content": "x"}]})
CHAT = json.dumps({"messages": [{"role": "user", "content": "x"}]})
PICTURE = json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}]})
UP = "model.layers.1.mlp.up_proj.weight"
LAYERS, SOLVER = "pipeline/config/layers", "pipeline/config/solver"
OWN_CODE = (
    '{"architectures": ["XForCausalLM"], "model_type": "x", "auto_map": {"AutoConfig": "x.Y"}}'
)
GRID_OF_TEXT = """\
prune: {dataset: '{d}/text.txt', seqlen: 32, nsamples: 4}
eval: {dataset: '{d}/text.txt', seqlen: 32}
vary: {damping: [0.1]}
"""
GRID_VARY = "vary:\n  damping: [0.1, 0.2]\n"
