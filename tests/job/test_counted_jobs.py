"""Jobs with --calibrate-on responses: killed, damaged, refused, and what they say."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.prune import PruneConfig
from pipeline.messages import Job
from pipeline.models.skeleton import Skeleton
from pipeline.records.manifest import read_manifest
from pipeline.records.status import read_status
from pipeline.text.sequences import TokenSequences
from pipeline.worker.local_executor import LocalExecutor
from storage.errors import CorruptFileError, DataError, ModelError, RunDirectoryError
from storage.run.activations import read_tokens
from storage.run.directory import RunDirectory
from tests.support.counted import ON_RESPONSES, cut_none, cut_turns, random_ids
from tests.support.damage import Notes, Tiny, copied, flip
from tests.support.jobs import SMALL, prune_here

TinyModel = Callable[..., Path]


class Unused(LocalExecutor):
    """Fails the test where workers are started."""

    def start(self, job: Job) -> None:
        raise AssertionError("the workers have been started")


def results(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "prox24.json").read_text())
    return found


# -- killed, damaged, resumed ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    return Tiny.make(folder, cut=cut_turns, **ON_RESPONSES)


@pytest.fixture(scope="module")
def begun(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a job that was killed between two phases of its second block."""
    return tiny.killed(tmp_path_factory.mktemp("begun") / "job", "solve", 1)


def test_a_killed_job_ends_with_the_same_bytes(tiny: Tiny, begun: Path, tmp_path: Path) -> None:
    copied(begun, tmp_path)
    tiny.prune(tmp_path)
    tiny.check(tmp_path)


def test_damaged_files_are_made_again_with_the_tokens_that_count(
    tiny: Tiny, begun: Path, tmp_path: Path
) -> None:
    """The tokens' file; and row slices, which are solved again from inputs made again."""
    run, notes = copied(begun, tmp_path), Notes()
    stored = (run / "tokens.arrow").read_bytes()
    damaged = [run / "tokens.arrow", next(run.glob("checkpoints/block-000/*.safetensors"))]
    for path in damaged:
        flip(path)
    tiny.prune(tmp_path, notes)
    tiny.check(tmp_path)
    assert all(notes.name(path) for path in damaged), notes.notes
    assert (run / "tokens.arrow").read_bytes() == stored


def test_tokens_that_count_otherwise_now_are_refused(
    tiny: Tiny, begun: Path, tmp_path: Path
) -> None:
    run = copied(begun, tmp_path)
    flip(run / "tokens.arrow")

    def otherwise(skeleton: Skeleton, config: PruneConfig) -> TokenSequences:
        sequences = cut_turns(skeleton, config)
        assert sequences.counted is not None
        counted = sequences.counted.clone()
        counted[2, 3] ^= True
        return replace(sequences, counted=counted)

    with pytest.raises(CorruptFileError, match="gives other tokens now"):
        replace(tiny, cut=otherwise).prune(tmp_path)


def test_a_job_is_not_continued_with_another_choice(
    tiny: Tiny, begun: Path, tmp_path: Path
) -> None:
    copied(begun, tmp_path)
    with pytest.raises(RunDirectoryError, match=r"calibrate_on: .*responses.* there, .*all.* here"):
        tiny.prune(tmp_path, calibrate_on="all")


# -- what cannot be done --------------------------------------------------------------------------


def chosen(*sequences: int) -> Callable[[Skeleton, PruneConfig], TokenSequences]:
    """Cuts tokens of which only those of some sequences count."""

    def cut(_: Skeleton, config: PruneConfig) -> TokenSequences:
        ids = random_ids(config.nsamples, config.seqlen)
        counted = torch.zeros_like(ids, dtype=torch.bool)
        counted[list(sequences), 5:] = True
        return TokenSequences(ids, counted)

    return cut


@pytest.mark.parametrize(
    ("cut", "options", "message"),
    [
        (cut_none, {}, r"text\.txt: --calibrate-on responses needs chat data"),
        (chosen(), {}, r"text\.txt: no token of a response is in the 8 calibration sequences"),
        (chosen(4), {"shrinkage": "auto"}, r"text\.txt: --shrinkage auto compares two halves"),
        (
            chosen(4),
            {"method": "wanda", "override": "*.o_proj=prox_admm", "shrinkage": "auto"},
            r"text\.txt: --shrinkage auto compares two halves",
        ),
    ],
    ids=["no chat", "no response", "one sequence", "one sequence, of some layers"],
)
def test_text_without_enough_responses_is_refused_before_any_compute(
    tiny_model: TinyModel,
    tmp_path: Path,
    cut: Callable[[Skeleton, PruneConfig], TokenSequences],
    options: dict[str, Any],
    message: str,
) -> None:
    source = tiny_model("llama")
    with pytest.raises(DataError, match=message) as caught:
        prune_here(
            source, tmp_path / "out", cut=cut, executor=Unused(1, 1), **ON_RESPONSES, **options
        )
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_sequence_is_enough_where_nothing_is_compared(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    options = ON_RESPONSES | {"shrinkage": "estimate"}
    output = prune_here(tiny_model("llama"), tmp_path / "out", cut=chosen(4), **options).output
    assert isinstance(output, Path)
    assert {layer["tokens"] for layer in results(output)["layers"]} == {SMALL["seqlen"] - 5}


def test_a_layer_that_is_called_in_another_order_is_refused_by_name(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def sequences_last(mlp: Any, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        output: Tensor = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        return output.transpose(0, 1)

    monkeypatch.setattr(LlamaMLP, "forward", sequences_last)
    source = tiny_model("llama")
    prune_here(source, tmp_path / "all", cut=cut_turns)
    with pytest.raises(ModelError, match=r"^model\.layers\.0\.mlp\.gate_proj: .*--exclude"):
        prune_here(source, tmp_path / "out", cut=cut_turns, **ON_RESPONSES)
    left = ON_RESPONSES | {"exclude": r".*\.mlp\..*"}
    assert prune_here(source, tmp_path / "attention", cut=cut_turns, **left).summary


# -- what is said ---------------------------------------------------------------------------------


def test_the_tokens_that_count_are_said_and_recorded(tiny_model: TinyModel, tmp_path: Path) -> None:
    notes = Notes()
    options = ON_RESPONSES | {"no_report": False}
    result = prune_here(
        tiny_model("llama"), tmp_path / "out", cut=cut_turns, progress=notes, **options
    )
    run = RunDirectory(result.run_directory)
    ids, counted = read_tokens(run.tokens())
    assert counted is not None
    count = int(counted.sum())
    assert any(f"{count:,} of {ids.numel():,} calibration tokens" in n for n in notes.choices)
    manifest = read_manifest(run)
    assert manifest is not None
    assert manifest["text"] == {"counted_tokens": count}
    assert isinstance(result.output, Path)
    assert results(result.output)["text"] == {"counted_tokens": count}
    card = (result.output / "README.md").read_text()
    assert f"| tokens that count in the statistics | `{count}` |" in card
    assert "| statistics of | `responses` |" in card
    assert read_status(run)["job"]["counted_tokens"] == count
    page = re.sub("<[^>]*>", "", html.unescape((run.report() / "report.html").read_text()))
    assert f"8 × 32 tokens of text.txt, of which the {count:,} of the responses count" in page
    # 64 inputs, and fewer than four tokens for each of them.
    wanted = -(-4 * 64 * SMALL["nsamples"] // count)
    assert f"{count} tokens are few for layers with 64 inputs" in page
    assert f"--nsamples {wanted} or more" in page
