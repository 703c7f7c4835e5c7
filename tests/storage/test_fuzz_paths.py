"""Links, names and pipes that lead out of a model's or a job's folder: nothing outside is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.models.skeleton import open_skeleton
from pipeline.records.status import find_run_directory, read_status
from storage.errors import CorruptFileError, InputError, ModelError, RunDirectoryError
from storage.files.commit import read_json, verify_file
from storage.model.files import ModelFiles
from storage.run.activations import open_activation_shard, read_tokens
from storage.run.directory import RunDirectory
from storage.run.lock import read_owner
from tests.support.hostile import Watch
from tests.support.jobs import contents, prune_here, write_text

TinyModel = Callable[..., Path]


def refused(reader: Callable[[], object], kind: type[InputError], *roots: Path) -> str:
    """The message of the error of that kind; nothing but the roots' files was touched."""
    caught: list[str] = []

    def run() -> None:
        with pytest.raises(kind) as raised:
            reader()
        caught.append(str(raised.value))

    Watch(*roots).run(run)
    return caught[0]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def skeleton(folder: Path) -> None:
    open_skeleton(folder, dtype=None, trust_remote_code=False)


# -- the source model ----------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_link_out_of_the_model(tiny_model: TinyModel, file: str) -> None:
    model = tiny_model()
    outside = model.parent / "outside"
    (model / file).rename(outside)
    (model / file).symlink_to(outside)
    assert "outside" in refused(lambda: skeleton(model), CorruptFileError, model)
    (model / file).unlink()
    (model / file).symlink_to("/dev/zero")
    refused(lambda: skeleton(model), InputError, model)
    (model / file).unlink()
    os.mkfifo(model / file)
    refused(lambda: skeleton(model), ModelError, model)


@pytest.mark.parametrize("name", [f"{p}x.safetensors" for p in ("/etc/", "../", "a/../../")])
def test_an_index_that_names_files_elsewhere(tiny_model: TinyModel, name: str) -> None:
    model = tiny_model(weight_files=2)
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {next(iter(weight_map)): name})
    assert name in refused(lambda: skeleton(model), CorruptFileError, model)


def hub_cache(model: Path, folder: Path) -> Path:
    """The model as the hub's cache has it: a snapshot of links into the folder of blobs."""
    cache = folder / "models--some--model"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, cache / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_snapshot_in_the_hub_cache_works(tiny_model: TinyModel, tmp_path: Path) -> None:
    snapshot = hub_cache(tiny_model(weight_files=2), tmp_path)
    watch = Watch(snapshot.parent.parent)
    watch.run(lambda: skeleton(snapshot))
    assert any("/blobs/" in path for path in watch.seen)
    before = contents(snapshot)
    prune_here(snapshot, tmp_path / "output", method="magnitude")
    assert contents(snapshot) == before
    # Another model's cache folder is not this model's.
    other = tmp_path / "models--other--model"
    other.mkdir()
    (other / "blob").write_bytes((snapshot / "config.json").read_bytes())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(other / "blob")
    refused(lambda: skeleton(snapshot), CorruptFileError, snapshot.parent.parent)


def test_a_config_that_leads_to_other_files_or_code(tiny_model: TinyModel) -> None:
    model = tiny_model()
    shutil.copy(model / "config.json", model.parent / "config.4.0.0.json")
    config = (model / "config.json").read_text()
    for changes in (
        {"configuration_files": ["../config.4.0.0.json"]},
        {"attn_implementation": "nobody/kernel"},
        {"_attn_implementation": "nobody/kernel:function"},
        {"_attn_implementation": {"": "sdpa", "text_config": "paged|nobody/kernel"}},
        {"text_config": {"experts_implementation": "nobody/kernel"}},
    ):
        (model / "config.json").write_text(config)
        edit(model / "config.json", **changes)
        message = refused(lambda: skeleton(model), ModelError, model)
        assert "config.json" in message
        assert "files" in message or "--trust-remote-code" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 2**62),
        ("num_labels", 10**9),
        ("max_position_embeddings", 10**9),
        ("vocab_size", 2**40),
        ("head_dim", 2**40),
        ("hidden_size", 10**4000),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_config_of_immense_numbers(
    tiny_model: TinyModel, architecture: str, key: str, value: int
) -> None:
    """Refused, or of no consequence, in little time and memory."""
    model = tiny_model(architecture)
    skeleton(model)  # imports the architecture
    edit(model / "config.json", **{key: value})
    Watch(model).run(lambda: skeleton(model))


def test_a_table_that_no_weight_file_holds_is_refused(tiny_model: TinyModel) -> None:
    """GPT-J keeps a table of positions that is in no file."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tiny_model()
    config = AutoConfig.for_model(
        "gptj", n_layer=1, n_embd=16, n_head=2, vocab_size=260, rotary_dim=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    skeleton(model)
    edit(model / "config.json", n_positions=10**9)
    assert "GB" in refused(lambda: skeleton(model), ModelError, model)


# -- the run directory ---------------------------------------------------------------------------


READERS: dict[str, Callable[[Path], object]] = {
    "record": lambda path: read_json(path, 1),
    "tokens": read_tokens,
    "shard": lambda path: open_activation_shard(path, sha256=None),
    "hash": lambda path: verify_file(path, "0" * 64),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["link", "device", "pipe", "folder", "absent"])
def test_what_is_no_file_of_ours_is_not_read(tmp_path: Path, reader: str, kind: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    outside, path = tmp_path / "outside", run / "file"
    outside.write_text('{"schema_version": 1}')
    make: dict[str, Callable[[], object]] = {
        "link": lambda: path.symlink_to(outside),
        "device": lambda: path.symlink_to("/dev/zero"),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "absent": lambda: None,
    }
    make[kind]()
    assert str(path) in refused(lambda: READERS[reader](path), CorruptFileError, run)


@pytest.mark.parametrize("area", ["checkpoints", "activations", "choices", "report"])
def test_a_link_out_of_the_run_directory(tiny_model: TinyModel, tmp_path: Path, area: str) -> None:
    """A job does not begin in it, and the status does not follow it."""
    model, run, outside = tiny_model(), tmp_path / "output.run", tmp_path / "outside"
    (outside / "block-000").mkdir(parents=True)
    (outside / "block-000" / "record.json").write_text("{}")
    (outside / "summary.json").write_text("{}")
    run.mkdir()
    (run / area).symlink_to(outside)
    (run / "run.json").symlink_to(outside / "summary.json")
    before = contents(tmp_path)
    watch = Watch(run)
    watch.run(lambda: read_status(find_run_directory(run)))
    (run / "run.json").unlink()
    write_text(tmp_path / "text.txt")
    with pytest.raises(RunDirectoryError, match="outside the run directory"):
        prune_here(model, tmp_path / "output")
    assert {n: raw for n, raw in contents(tmp_path).items() if n in before} == {
        n: raw for n, raw in before.items() if n != "output.run/run.json"
    }


def test_a_lock_that_is_a_link_or_a_pipe(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "outside").write_text("{}")
    (run / "lock-a.json").symlink_to(tmp_path / "outside")
    os.mkfifo(run / "lock-b.json")
    Watch(run).run(lambda: read_owner(run))
    assert read_owner(run) is None


def test_a_path_given_by_a_record_stays_inside(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    for name in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(RunDirectoryError):
            run.contained(Path(name))
    assert run.contained(Path("tokens.arrow")) == run.path.resolve() / "tokens.arrow"
    with pytest.raises(ModelError):
        ModelFiles.open(tmp_path / "absent")
