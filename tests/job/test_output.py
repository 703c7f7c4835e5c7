"""The output folder: the source's layout byte for byte, and there whole or not at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from storage.errors import CorruptFileError, ModelError, OutputError
from storage.files.commit import sha256_file
from storage.model.files import INDEX_FILE, ModelFiles
from storage.output import weight_files as output_module
from storage.output.weight_files import (
    copy_side_files,
    publish_output,
    recover_output,
    write_weight_file,
)

UNTOUCHED: Callable[[str], Iterable[torch.Tensor] | None] = lambda name: None  # noqa: E731


@pytest.fixture
def source(tiny_model: Callable[..., Path]) -> ModelFiles:
    return ModelFiles.open(tiny_model("llama", weight_files=2, dtype=torch.bfloat16))


def test_untouched_files_are_equal_byte_for_byte(
    source: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_module, "CHUNK_BYTES", 1000)  # tensors span many chunks
    for file in source.files:
        path = tmp_path / "new" / file
        stored = write_weight_file(source, file, path, UNTOUCHED)
        assert path.read_bytes() == (source.folder / file).read_bytes()
        assert stored.name == file
        assert stored.bytes == path.stat().st_size
        assert stored.sha256 == sha256_file(path)


@pytest.mark.parametrize("pieces", [1, 3])
def test_a_replaced_tensor_is_new_and_all_else_is_the_sources(
    source: ModelFiles, tmp_path: Path, pieces: int
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    file = source.tensors[name].file
    new = torch.randn(source.tensors[name].shape).bfloat16()

    def replacement(asked: str) -> Iterable[torch.Tensor] | None:
        return iter(new.tensor_split(pieces)) if asked == name else None

    path = tmp_path / file
    write_weight_file(source, file, path, replacement)
    before, after = load_file(source.folder / file), load_file(path)
    assert list(before) == list(after)
    assert torch.equal(after.pop(name), new)
    assert not torch.equal(before.pop(name), new)
    for other, tensor in before.items():
        assert torch.equal(after[other], tensor)
    header = source.header_bytes(file)
    assert path.read_bytes().startswith(header)


def test_writing_again_replaces_an_earlier_attempt(source: ModelFiles, tmp_path: Path) -> None:
    path = tmp_path / source.files[0]
    path.write_bytes(b"of an attempt that died")
    write_weight_file(source, source.files[0], path, UNTOUCHED)
    assert path.read_bytes() == (source.folder / source.files[0]).read_bytes()
    assert list(tmp_path.glob("*.tmp")) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: [weight.float()],
        lambda weight: [weight[:, :-1]],
        lambda weight: [weight[:-1]],
        lambda weight: [weight, weight],
        lambda weight: [],
    ],
    ids=["dtype", "columns", "rows short", "rows twice", "nothing"],
)
def test_a_replacement_that_does_not_fit_leaves_no_file(
    source: ModelFiles, tmp_path: Path, change: Callable[[torch.Tensor], list[torch.Tensor]]
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    file = source.tensors[name].file

    def replacement(asked: str) -> Iterable[torch.Tensor] | None:
        return change(source.read(name)) if asked == name else None

    with pytest.raises(ModelError, match=name):
        write_weight_file(source, file, tmp_path / "new" / file, replacement)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_source_that_changed_meanwhile_is_refused(source: ModelFiles, tmp_path: Path) -> None:
    first, second = source.files
    (source.folder / first).write_bytes((source.folder / second).read_bytes())
    with pytest.raises(CorruptFileError, match="changed"):
        write_weight_file(source, first, tmp_path / "new" / first, UNTOUCHED)


def test_side_files_are_copied_and_dense_weights_are_not(
    source: ModelFiles, tmp_path: Path
) -> None:
    copied = {
        "added_tokens.json": "{}",
        "chat_template.jinja": "{{ x }}",
        "modeling_mine.py": "x = 1",
        "tokenizer.model": "binary",
        "LICENSE": "text",
        "additional_chat_templates/tool.jinja": "{{ y }}",
    }
    left_out = [
        "README.md",
        "prox24.json",
        ".gitattributes",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "consolidated.00.pth",
        "model.GGUF",
        "original/params.json",
    ]
    for name in [*copied, *left_out]:
        path = source.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(copied.get(name, "no"))
    os.mkfifo(source.folder / "a-pipe")
    before = {path.name for path in source.folder.iterdir() if path.suffix == ".json"}
    expected = (before - {"prox24.json", "pytorch_model.bin.index.json"}) | set(copied)
    assert INDEX_FILE in expected
    assert "config.json" in expected
    destination = tmp_path / "new"
    assert copy_side_files(source, destination) == sorted(expected)
    found = {p.relative_to(destination).as_posix() for p in destination.rglob("*") if p.is_file()}
    assert found == expected
    for name in expected:
        assert (destination / name).read_bytes() == (source.folder / name).read_bytes()


def test_an_index_without_its_files_is_not_copied(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    (folder / INDEX_FILE).write_text('{"weight_map": {}}')
    assert INDEX_FILE not in copy_side_files(ModelFiles.open(folder), tmp_path / "new")


def test_a_side_file_that_links_out_of_the_model_is_refused(
    source: ModelFiles, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("mine")
    (source.folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptFileError, match="outside the model"):
        copy_side_files(source, tmp_path / "new")


def fill(folder: Path, who: str) -> Path:
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text(who)
    (folder / "sub" / "file").write_text(who)
    return folder


def who_is(folder: Path) -> str:
    assert (folder / "sub" / "file").read_text() == (folder / "config.json").read_text()
    return (folder / "config.json").read_text()


def test_publishing_into_nothing_and_into_an_empty_folder(tmp_path: Path) -> None:
    for number, make in enumerate([lambda path: None, Path.mkdir]):
        partial, output = fill(tmp_path / f"partial{number}", "new"), tmp_path / f"out{number}"
        (partial / ".model.safetensors.1-0.tmp").write_text("of a worker that died")
        make(output)
        publish_output(partial, output, overwrite=False)
        assert who_is(output) == "new"
        assert sorted(p.name for p in output.iterdir()) == ["config.json", "sub"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out0", "out1"]


def test_a_folder_in_use_is_replaced_only_on_demand(tmp_path: Path) -> None:
    partial, output = fill(tmp_path / "partial", "new"), fill(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="--overwrite"):
        publish_output(partial, output, overwrite=False)
    assert (who_is(output), who_is(partial)) == ("old", "new")
    publish_output(partial, output, overwrite=True)
    assert who_is(output) == "new"
    assert list(tmp_path.iterdir()) == [output]


def test_what_must_not_be_replaced_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = fill(tmp_path / "out" / "partial", "new")
    with pytest.raises(OutputError, match="contains the new model"):
        publish_output(partial, tmp_path / "out", overwrite=True)
    here = fill(tmp_path / "here", "mine")
    monkeypatch.chdir(here / "sub")
    with pytest.raises(OutputError, match="contains the working directory"):
        publish_output(partial, here, overwrite=True)
    a_file = tmp_path / "file"
    a_file.write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        publish_output(partial, a_file, overwrite=True)
    with pytest.raises(OutputError, match="no such folder"):
        publish_output(tmp_path / "nothing", tmp_path / "there", overwrite=True)
    assert (who_is(partial), who_is(here), a_file.read_text()) == ("new", "mine", "mine")


def test_a_working_directory_that_is_gone_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray may delete that of a submitted job while it still runs."""
    partial = fill(tmp_path / "partial", "new")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    publish_output(partial, tmp_path / "out", overwrite=False)
    assert who_is(tmp_path / "out") == "new"


def test_an_output_that_is_a_link_stays_one(tmp_path: Path) -> None:
    partial, target = fill(tmp_path / "partial", "new"), fill(tmp_path / "target", "old")
    (tmp_path / "link").symlink_to(target)
    publish_output(partial, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert who_is(target) == "new"


def publish_and_die(folder: Path, nth: int) -> bool:
    """Publish over an old folder in a forked process that gets a real SIGKILL before its n-th
    system call of the kinds below; False if it makes fewer and comes to its end."""
    count = 0

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            count += 1
            if count == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    child = os.fork()
    if child == 0:
        try:
            for name in ("fsync", "rename", "unlink", "rmdir"):
                setattr(os, name, counted(getattr(os, name)))
            recover_output(folder / "out")
            publish_output(folder / "partial", folder / "out", overwrite=True)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_killed_anywhere_a_whole_folder_comes_back(tmp_path: Path) -> None:
    seen, between = set(), 0
    for nth in range(1, 60):
        folder = tmp_path / str(nth)
        fill(folder / "partial", "new")
        fill(folder / "out", "old")
        died = publish_and_die(folder, nth)
        between += not (folder / "out").exists()
        recover_output(folder / "out")
        seen.add(who_is(folder / "out"))
        if (folder / "partial").exists():
            assert who_is(folder / "out") == "old"
            publish_output(folder / "partial", folder / "out", overwrite=True)
        assert who_is(folder / "out") == "new"
        assert [path.name for path in folder.iterdir()] == ["out"]
        if not died:
            break
    assert not died
    assert between >= 1
    assert seen == {"old", "new"}
