"""Whole jobs with --reconstruct: against a plain loop, on any number of workers and threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.config.solver import SolverSettings
from pipeline.reconstruct import schedule
from pipeline.records.summary import read_summary
from pipeline.runtime.threads import set_threads
from storage.run.directory import RunDirectory
from tests.support.jobs import (
    check_output,
    is_linear_of_a_block,
    prune_here,
    tensors,
    write_text,
)
from tests.support.plain_prune import job_tokens
from tests.support.plain_reconstruct import reconstruct_in_memory
from tests.support.tiny_models import save_tiny_model

OPTIONS: dict[str, Any] = {
    "reconstruct": "block", "reconstruct_epochs": 3, "reconstruct_batch": 4,
    "reconstruct_lr": 1.6e-3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Any:
    yield
    set_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "llama", blocks=3)


def blocks_of(output: Path) -> list[dict[str, Any]]:
    summary = read_summary(RunDirectory(output.with_name(f"{output.name}.run")))
    return [block["reconstruct"] for block in summary["blocks"]]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"reconstruct_lr": 0.01},  # many weights change places
        {"reconstruct_mask": "fixed"},
        {"reconstruct_target": "dense-block"},
        {"reconstruct_norms": True},
    ],
    ids=str,
)
def test_it_is_the_plain_loop(model: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    output = tmp_path / "out"
    prune_here(model, output, **(OPTIONS | changed))
    plain = AutoModelForCausalLM.from_pretrained(model)
    names = [
        [
            f"model.layers.{block}.{name}"
            for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        for block, layer in enumerate(plain.model.layers)
    ]
    losses = reconstruct_in_memory(
        plain,
        job_tokens(model, tmp_path / "text.txt"),
        names,
        SolverSettings(method="prox_admm").resolved(),
        epochs=3,
        batch=4,
        share=(OPTIONS | changed)["reconstruct_lr"],
        seed=0,
        dense_chain="reconstruct_target" not in changed,
        norms="reconstruct_norms" in changed,
        exchange="reconstruct_mask" not in changed,
    )
    ours = [(block["before"], block["after"]) for block in blocks_of(output)]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(losses), rtol=1e-4, atol=0)
    state = plain.state_dict()
    for name, tensor in tensors(output):
        torch.testing.assert_close(tensor, state[name], rtol=1e-3, atol=1e-6, msg=name)


def test_workers_and_threads_change_no_byte(model: Path, tmp_path: Path) -> None:
    made = []
    for workers, threads in ((1, 1), (2, 1), (3, 2), (1, 3)):
        output = tmp_path / f"out-{workers}-{threads}"
        prune_here(model, output, workers=workers, threads=threads, nsamples=13, **OPTIONS)
        made.append({path.name: path.read_bytes() for path in output.glob("*.safetensors")})
    assert made[0] == made[1] == made[2] == made[3]


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("magnitude", "2:4"),
        ("magnitude", "unstructured:0.5"),
        ("wanda", "4:8"),
        ("wanda", "unstructured:0.5"),
        ("sparsegpt", "2:4"),
        ("sparsegpt", "unstructured:0.5"),
        ("prox", "2:4"),
        ("prox_admm", "2:4"),
    ],
)
def test_after_any_method_and_pattern(
    model: Path, tmp_path: Path, method: str, pattern: str
) -> None:
    shared = {"method": method, "pattern": pattern}
    prune_here(model, tmp_path / "solved", **shared)
    prune_here(model, tmp_path / "trained", **shared, **OPTIONS, reconstruct_mask="fixed")
    solved, changed = dict(tensors(tmp_path / "solved")), 0
    for name, tensor in tensors(tmp_path / "trained"):
        if name.startswith("model.layers.0."):  # later blocks have other inputs
            assert torch.equal(tensor == 0, solved[name] == 0), name
        changed += not torch.equal(tensor, solved[name])
    assert changed >= 7
    first, *others = blocks_of(tmp_path / "trained")
    assert first["after"] < first["before"]
    assert all(block["after"] <= block["before"] for block in others)


def test_weights_may_change_places(model: Path, tmp_path: Path) -> None:
    made, moved = [], 0
    exchange = OPTIONS | {"reconstruct_mask": "exchange", "reconstruct_lr": 0.02}
    prune_here(model, tmp_path / "fixed", **OPTIONS)
    fixed = dict(tensors(tmp_path / "fixed"))
    for workers in (1, 3):
        output = tmp_path / f"out-{workers}"
        prune_here(model, output, workers=workers, **exchange)
        made.append(_bytes(output))
        check_output(model, output)
    assert made[0] == made[1]
    for name, tensor in tensors(tmp_path / "out-1"):
        if is_linear_of_a_block(name):
            moved += int(((tensor != 0) != (fixed[name] != 0)).sum())
    assert moved > 0
    summary = read_summary(RunDirectory(tmp_path / "out-1.run"))
    for block in summary["blocks"]:
        for layer, mask in block["masks"].items():
            stored = dict(tensors(tmp_path / "out-1"))[
                f"model.layers.{block['block']}.{layer}.weight"
            ]
            assert mask["kept"] == int((stored != 0).sum())


def test_a_block_in_parts(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MOST_WEIGHTS", 4096)
    made = []
    for workers in (1, 2):
        prune_here(model, tmp_path / f"out-{workers}", workers=workers, **OPTIONS)
        made.append(_bytes(tmp_path / f"out-{workers}"))
    assert made[0] == made[1]
    for block in blocks_of(tmp_path / "out-1"):
        assert len(block["parts"]) > 1
        afters = [part["after"] for part in block["parts"]]
        befores = [part["before"] for part in block["parts"]]
        assert befores == [block["before"], *afters[:-1]]
        assert block["after"] == afters[-1] <= block["before"]


def test_dense_layers_and_blocks_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    override = "model.layers.1.*=dense;*.o_proj=dense"
    prune_here(model, tmp_path / "out", override=override, **OPTIONS)
    source = dict(tensors(model))
    for name, tensor in tensors(tmp_path / "out"):
        dense = ".layers.1." in name or "o_proj" in name or "_proj" not in name
        assert torch.equal(tensor, source[name]) == dense, name
    first, second, third = blocks_of(tmp_path / "out")
    assert second is None
    assert first["after"] < first["before"]
    assert third["after"] <= third["before"]


def test_a_loss_that_is_not_finite_keeps_the_solved_weights(model: Path, tmp_path: Path) -> None:
    text = str(write_text(tmp_path / "text.txt"))
    prune_here(model, tmp_path / "solved", dataset=text)
    wild = OPTIONS | {"reconstruct_lr": 1e38}
    prune_here(model, tmp_path / "trained", dataset=text, **wild)
    assert dict(_bytes(tmp_path / "solved")) == dict(_bytes(tmp_path / "trained"))
    for block in blocks_of(tmp_path / "trained"):
        assert block["kept"] == "solved"
        assert not block["finite"]
        assert block["after"] == block["before"]


def test_no_loss_of_held_out_sequences_is_above_the_solved_blocks(
    model: Path, tmp_path: Path
) -> None:
    prune_here(model, tmp_path / "out", **(OPTIONS | {"reconstruct_lr": 0.5}))
    for block in blocks_of(tmp_path / "out"):
        assert block["after"] <= block["before"] == block["held_out"][0]
        assert block["after"] == min(block["held_out"])


def test_the_run_directory_keeps_no_target_and_no_solved_record(
    model: Path, tmp_path: Path
) -> None:
    prune_here(model, tmp_path / "out", **OPTIONS)
    left = [path.name for path in (tmp_path / "out.run").rglob("*") if path.is_file()]
    assert not [name for name in left if name.startswith(("solved", "shard", "rank", "trained"))]
    assert (
        json.loads((tmp_path / "out" / "prox24.json").read_text())["job"]["settings"]["reconstruct"]
        == "block"
    )


def _bytes(folder: Path) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))]
