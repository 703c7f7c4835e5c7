"""Every family's perplexity is that of transformers, alone and of a finished job's model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from cluster.command_line import run
from tests.support import moe_models, multimodal
from tests.support.families import FAMILIES
from tests.support.jobs import write_text
from tests.support.tiny_models import byte_tokenizer, random_model

SEQLEN = 16
MANY, ONE, SHORT = 4, 1, 2  # sequences of the texts; batches are of 1 and of 3
LOCAL = ("--executor", "local", "--threads", "1", "--dtype", "float32", "--seqlen", str(SEQLEN))
MIXTURES = (*moe_models.FAMILIES, *moe_models.STACKED)
WRAPPERS = {f"{name}, with images": name for name in multimodal.WRAPPERS}
NAMES = (*FAMILIES, *MIXTURES, *WRAPPERS)
# Blocks that return tuples and such that return tensors, mixtures stored both ways, a wrapper.
QUICK = (
    "falcon",
    "bloom",
    "mpt",
    "gpt2",
    "opt",
    "llama",
    "mixtral",
    "gpt_oss",
    "llava, with images",
)
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    """Makes the folder of a family's tiny model, once."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("family") / "model"
        if name in MIXTURES:
            return moe_models.save_moe(folder, name)
        if name in WRAPPERS:
            return multimodal.save_wrapper(folder, WRAPPERS[name])
        random_model(FAMILIES[name].config()).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    yield make
    make.cache_clear()


def text_of(folder: Path, sequences: int) -> Path:
    """A text of so many sequences, and a few tokens more."""
    return write_text(folder / f"{sequences}.txt", characters=sequences * SEQLEN + 3)


@torch.no_grad()
def plain_perplexity(folder: Path, text: Path) -> float:
    """What transformers' own loss comes to, each sequence alone, with the whole model in memory."""
    names = json.loads((folder / "config.json").read_text())["architectures"][0]
    wrapped = names.endswith("ForConditionalGeneration")
    factory: Any = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
    model = factory.from_pretrained(folder, dtype=torch.float32).eval()
    ids = byte_tokenizer()(text.read_text()).input_ids
    rows = torch.tensor(ids[: len(ids) // SEQLEN * SEQLEN]).reshape(-1, SEQLEN)
    losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in rows]
    return math.exp(sum(losses) / len(losses))


def evaluated(folder: Path, text: Path, batch: int, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    arguments = ["--dataset", str(text), "--batch-size", str(batch), *LOCAL, "--json"]
    assert run(["eval", str(folder), *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", CASES)
def test_perplexity_is_that_of_transformers(
    saved: Saved, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(name)
    for sequences in (MANY, ONE):
        text = text_of(tmp_path, sequences)
        expected = plain_perplexity(source, text)
        for batch in (1, 3):
            found = evaluated(source, text, batch, capsys)
            assert found["nsamples"] == sequences
            assert found["perplexity"] == pytest.approx(expected, rel=1e-5), batch


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("batch", "sequences"), [(1, ONE), (3, SHORT)])
def test_a_job_states_the_perplexity_of_its_output(
    saved: Saved, name: str, batch: int, sequences: int, tmp_path: Path
) -> None:
    """With as little text as there may be: fewer sequences than a batch has."""
    text, output = text_of(tmp_path, sequences), tmp_path / "out"
    calibration = write_text(tmp_path / "calibration.txt")
    arguments = ["--dataset", str(calibration), "--nsamples", str(sequences), "--batch-size"]
    arguments += [str(batch), "--eval-dataset", str(text), "--method", "magnitude", "--no-report"]
    assert run(["prune", str(saved(name)), str(output), *arguments, *LOCAL]) == 0
    stated = json.loads((output / "prox24.json").read_text())["perplexity"]
    assert stated["nsamples"] == sequences
    assert stated["perplexity"] == pytest.approx(plain_perplexity(output, text), rel=1e-5)
