"""Texts as users have them, through the command line as a process of its own, with defaults."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from cluster.command_line import run
from tests.support.chat_models import CHATML, chat_tokenizer
from tests.support.jobs import contents

WORDS = "the quick brown fox jumps over a lazy dog and runs away "
SHAREGPT = [
    {
        "id": f"identity_{n}",
        "conversations": [
            {"from": "human", "value": f"question {n}: {WORDS}?"},
            {"from": "gpt", "value": f"answer {n}. {WORDS * 2}"},
        ],
    }
    for n in range(40)
]


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


def as_process(*arguments: object) -> Done:
    """Runs `prox24` as a process of its own."""
    command = [sys.executable, "-m", "cluster", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def prox24(capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `prox24` in this process, which has imported torch already."""

    def call(*arguments: object) -> Done:
        capfd.readouterr()
        status = run([str(argument) for argument in arguments])
        return Done(status, *capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer has a chat template and puts BOS before a text."""
    from tests.support.tiny_models import save_tiny_model

    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer = chat_tokenizer(bos=True)
    save_tiny_model(folder, "llama", tokenizer=False, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return folder


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prune(command: Command, model: Path, output: Path, dataset: object, *more: object) -> Done:
    small = ("--nsamples", 4, "--seqlen", 48, "--executor", "local")
    return command("prune", model, output, "--dataset", dataset, *small, *more)


def test_chats_are_calibrated_on_and_said_so(
    prox24: Command, chat_model: Path, tmp_path: Path
) -> None:
    data = lines(tmp_path / "sharegpt.jsonl", SHAREGPT)
    done = prune(as_process, chat_model, tmp_path / "all", data)
    assert done.returncode == 0, done.stderr
    assert "calibration text: conversations in `conversations`" in done.stderr
    record = json.loads((tmp_path / "all.run" / "run.json").read_text())["text"]
    result = json.loads((tmp_path / "all" / "prox24.json").read_text())
    assert result["text"] == record
    assert record["read"] == "conversations in `conversations`"
    assert record["bos"] == "<|begin|>"
    card = (tmp_path / "all" / "README.md").read_text()
    assert "conversations in conversations" in card
    assert all("counted_tokens" not in each for each in (record, result["text"]))

    done = prune(prox24, chat_model, tmp_path / "some", data, "--calibrate-on", "responses")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "some.run" / "run.json").read_text())["text"]
    assert 0 < record["counted_tokens"] < 4 * 47
    assert f"{record['counted_tokens']} of 192 calibration tokens" in done.stderr
    assert str(record["counted_tokens"]) in (tmp_path / "some" / "README.md").read_text()
    assert contents(tmp_path / "some") != contents(tmp_path / "all")
    layers = json.loads((tmp_path / "some" / "prox24.json").read_text())["layers"]
    assert {layer["tokens"] for layer in layers} == {record["counted_tokens"]}

    again = prune(prox24, chat_model, tmp_path / "some", data, "--overwrite")
    assert again.returncode == 2
    assert "calibrate_on" in again.stderr


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"id": "a1", "body": "some text"}] * 9, (), "id (a string, 'a1'), body (a string, 'some"),
        ([{"text": WORDS}] * 99, ("--calibrate-on", "responses"), "needs chat data"),
        ([{"text": WORDS}] * 99, ("--text-column", "words"), "no column 'words'"),
        (SHAREGPT, ("--chat-template", "/no/such/file"), "/no/such/file"),
        ([{"text": WORDS}] * 99, ("--bos", "sometimes"), "--bos"),
    ],
)
def test_what_is_refused_is_refused_before_compute(
    prox24: Command,
    chat_model: Path,
    tmp_path: Path,
    rows: list[Any],
    more: tuple[str, ...],
    message: str,
) -> None:
    data = lines(tmp_path / "data.jsonl", rows)
    done = prune(prox24, chat_model, tmp_path / "out", data, *more)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_c4_as_it_is_published_a_folder_and_a_saved_data_set(
    prox24: Command, chat_model: Path, tmp_path: Path
) -> None:
    """The same rows in three kinds of files are the same text."""
    rows = [{"text": f"{n} {WORDS * 3}", "timestamp": "2019", "url": f"u{n}"} for n in range(40)]
    folder = tmp_path / "c4" / "en"
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    name = "c4-train.00000-of-01024.json.gz"
    (folder / name).write_bytes(gzip.compress(text.encode()))
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    outputs = []
    for number, data in enumerate((folder / name, folder.parent, "saved", "list.json")):
        output = tmp_path / f"out{number}"
        done = prune(prox24, chat_model, output, tmp_path / data, "--method", "wanda")
        assert done.returncode == 0, done.stderr
        files = contents(output)
        outputs.append({name: files[name] for name in files if name.endswith(".safetensors")})
    assert all(output == outputs[0] for output in outputs)


def test_ids_are_noted_and_bos_is_in_the_result(
    prox24: Command, chat_model: Path, tmp_path: Path
) -> None:
    data = lines(tmp_path / "ids.jsonl", [{"text": f"{n:09d} {n * n:012d}"} for n in range(200)])
    done = prune(prox24, chat_model, tmp_path / "out", data, "--method", "wanda", "--nsamples", 12)
    assert done.returncode == 0, done.stderr
    assert "% of the text's characters are digits" in done.stderr
    figures = {}
    for bos in ("auto", "never"):
        more = ("--seqlen", 48, "--executor", "local", "--bos", bos)
        shown = prox24("eval", chat_model, "--dataset", data, *more)
        assert f"BOS of each: {'<|begin|>' if bos == 'auto' else 'none'}" in shown.stdout
        result = json.loads(prox24("eval", chat_model, "--dataset", data, *more, "--json").stdout)
        figures[bos] = result["perplexity"]
        assert result["text"]["bos"] == ("<|begin|>" if bos == "auto" else "none")
    assert figures["auto"] != figures["never"]


def test_perplexity_with_bos_is_transformers_own(
    prox24: Command, chat_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "text.txt"
    path.write_text(WORDS * 30)
    more = ("--seqlen", 48, "--executor", "local", "--json")
    result = json.loads(prox24("eval", chat_model, "--dataset", path, *more).stdout)
    tokenizer: Any = AutoTokenizer.from_pretrained(chat_model)
    model: Any = AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32)
    ids = tokenizer(WORDS * 30, add_special_tokens=False).input_ids
    pieces = [ids[start : start + 47] for start in range(0, len(ids) - 46, 47)]
    batch = torch.tensor([[tokenizer.bos_token_id, *piece] for piece in pieces])
    with torch.no_grad():
        expected = model(batch, labels=batch).loss.exp().item()
    assert result["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert result["predicted_tokens"] == 47 * len(pieces)


def test_a_template_given_as_a_file(
    prox24: Command, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model("llama")
    data = lines(tmp_path / "chat.jsonl", SHAREGPT)
    done = prune(prox24, model, tmp_path / "out", data, "--method", "wanda")
    assert done.returncode == 2
    assert "no chat template" in done.stderr
    template = tmp_path / "my template.jinja"
    template.write_text(CHATML)
    done = prune(
        prox24, model, tmp_path / "out", data, "--method", "wanda", "--chat-template", template
    )
    assert done.returncode == 0, done.stderr
    settings = json.loads((tmp_path / "out" / "prox24.json").read_text())["job"]["settings"]
    assert len(settings["chat_template"]) == 64
