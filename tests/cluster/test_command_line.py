"""The `prox24` command: its options, its YAML file, and `eval`."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.command_line import parse, run
from cluster.options import config_from
from pipeline.config.evaluate import EvalConfig
from pipeline.config.prune import PruneConfig
from storage.files.commit import sha256_file
from tests.support.jobs import write_text

TinyModel = Callable[..., Path]
LOCAL = ("--executor", "local", "--threads", "1", "--seqlen", "32", "--batch-size", "2")
# As the help must state them: the option, and its default or what unset means.
PRUNE_OPTIONS = {
    "--method": "prox_admm",
    "--pattern": "2:4",
    "--dataset": "allenai/c4",
    "--text-column": "text",
    "--nsamples": "128",
    "--seqlen": "2048",
    "--seed": "0",
    "--batch-size": "sequences",
    "--damping": "sparsegpt 0.01",
    "--shrinkage": "sparsegpt 0",
    "--blocksize": "128",
    "--refine": "cg for prox and prox_admm",
    "--refine-steps": "gradient 1000, cg",
    "--run-dir": "OUTPUT with `.run` appended",
    "--workers": "one per GPU",
    "--gpus-per-worker": "1 if the cluster has GPUs",
    "--ray-address": "a new Ray on this machine",
    "--placement-timeout": "300",
    "--network-interface": "that of the node's address in Ray",
    "--executor": "ray",
    "--dtype": "the source's",
    "--device": "cuda where there is one",
    "--overwrite": "replace a non-empty OUTPUT",
    "--skip-unsupported": "list them",
    "--config": "YAML",
}
EVAL_OPTIONS = {
    "--dataset": "Salesforce/wikitext",
    "--seqlen": "2048",
    "--nsamples": "the whole text",
    "--json": "one JSON object",
    "--dtype": "the source's",
    "--device": "cuda where there is one",
    "--executor": "ray",
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "options"), [("prune", PRUNE_OPTIONS), ("eval", EVAL_OPTIONS)])
def test_the_help_names_options_and_defaults(
    command: str, options: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([command, "--help"]) == 0
    help = capsys.readouterr().out.partition("options:")[2]
    # An option's own lines begin with its name, two columns in.
    entries = re.split(r"^  (?=-)", help, flags=re.MULTILINE)
    told = {entry.split()[0]: " ".join(entry.split()) for entry in entries if entry.strip()}
    for option, stated in options.items():
        assert stated in told[option], option
    assert not [option for option in told if "_" in option]


def test_the_defaults_of_the_config_are_those_of_the_command_line() -> None:
    options = parse(["prune", "model", "output"])
    assert config_from(options, PruneConfig) == PruneConfig()
    assert config_from(parse(["eval", "model"]), EvalConfig) == EvalConfig()


def test_a_yaml_file_and_the_command_line_over_it(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "method: wanda\n"
        "pattern: 4:8\n"  # which YAML 1.1 would take for a number of base 60
        "nsamples: 16\n"
        "batch-size: 8\n"
        "refine_steps: 7\n"
        "damping: 1e-2\n"
        "skip-unsupported: true\n"
        "overwrite: false\n"
        "run-dir: null\n"
        "seed: 3\n"
    )
    arguments = ["prune", "model", "output", "--seed", "4", "--config", str(file)]
    config = config_from(parse(arguments), PruneConfig)
    assert config == PruneConfig(
        method="wanda",
        pattern="4:8",
        nsamples=16,
        batch_size=8,
        refine_steps=7,
        damping=0.01,
        skip_unsupported=True,
        seed=4,
    )


def test_workers_auto_is_the_default_and_a_number_wins(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("workers: 4\n")
    base = ["prune", "model", "output", "--config", str(file)]
    assert config_from(parse(base), PruneConfig).workers == 4
    assert config_from(parse([*base, "--workers", "auto"]), PruneConfig) == PruneConfig()
    with pytest.raises(SystemExit):
        parse([*base, "--workers", "all"])


def test_a_job_from_a_yaml_file(tiny_model: TinyModel, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(f"executor: local\ndataset: {text}\nmethod: wanda\nnsamples: 4\nthreads: 1\n")
    output = tmp_path / "output"
    arguments = ["prune", tiny_model(), output, "--config", file, "--seqlen", 16]
    assert run([str(argument) for argument in arguments]) == 0
    settings = json.loads((output / "prox24.json").read_text())["job"]["settings"]
    assert (settings["method"], settings["nsamples"], settings["seqlen"]) == ("wanda", 4, 16)


# -- eval ----------------------------------------------------------------------------------------


@torch.no_grad()
def plain_perplexity(model: Path, text: Path, seqlen: int, nsamples: int | None) -> float:
    """By the convention of the field, with transformers' own forward and loss in float32."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids[0]
    count = nsamples or len(ids) // seqlen
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    pieces = ids[: count * seqlen].reshape(count, 1, seqlen)
    losses = [whole(input_ids=piece, labels=piece).loss.double() for piece in pieces]
    return math.exp(torch.stack(losses).mean())


@pytest.mark.parametrize("architecture", ["llama", "opt"])
@pytest.mark.parametrize("nsamples", [7, None])
def test_perplexity_is_transformers_own(
    tiny_model: TinyModel,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    architecture: str,
    nsamples: int | None,
) -> None:
    model, text = tiny_model(architecture), write_text(tmp_path / "text.txt", 32 * 20 + 5)
    arguments = ["eval", model, *LOCAL, "--dataset", text, "--json", "--workers", 2]
    arguments += ["--nsamples", nsamples] if nsamples else []
    before = sorted(tmp_path.rglob("*"))
    assert run([str(argument) for argument in arguments]) == 0
    found = json.loads(capfd.readouterr().out)
    expected = plain_perplexity(model, text, 32, nsamples)
    assert found["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert found["tokens"] == 32 * (nsamples or 20)
    assert (found["seqlen"], found["dataset"]) == (32, "text.txt")
    assert found["dataset_revision"] == f"sha256:{sha256_file(text)}"
    assert found["tokenizer"]["tokens"] == len(AutoTokenizer.from_pretrained(model))
    assert sorted(tmp_path.rglob("*")) == before


def test_json_alone_on_standard_output(tiny_model: TinyModel, text: Path, repository: Path) -> None:
    """Of a real process: whatever a library prints would show, too."""
    arguments = ["eval", tiny_model(), *LOCAL, "--dataset", text, "--json", "--nsamples", 4]
    done = subprocess.run(
        [sys.executable, "-m", "cluster", *map(str, arguments)],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found.keys() >= {"perplexity", "tokens", "seqlen", "dataset"}
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_without_json_people_read_it(
    tiny_model: TinyModel, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", tiny_model(), *LOCAL, "--dataset", text, "--nsamples", 4]
    assert run([str(argument) for argument in arguments]) == 0
    shown = capfd.readouterr().out
    first, second, third, rest = shown.split("\n")
    assert re.fullmatch(r"perplexity \d+\.\d+ on text\.txt \(4 x 32 tokens, float32\)", first)
    assert re.fullmatch(r"dataset sha256 [0-9a-f]{12}, tokenizer \w+ of 259 tokens", second)
    assert third == "text: plain text; the joined text in order; BOS of each: none"
    assert rest == ""


def test_the_commit_of_a_hub_data_set_is_stated_and_can_be_chosen(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    commits = {None: "c0ffee", "v1": "0ddba11"}
    read: list[str] = []

    class Hub:
        def dataset_info(self, identifier: str, revision: str | None) -> SimpleNamespace:
            assert identifier == "some/text"
            return SimpleNamespace(sha=commits[revision])

    def load_dataset(
        identifier: str, config: str, *, streaming: bool, revision: str
    ) -> dict[str, list[dict[str, str]]]:
        read.append(revision)
        return {"test": [{"text": "word " * 100}]}

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = ["eval", str(tiny_model()), *LOCAL, "--dataset", "some/text:en", "--json"]
    for options in ([], ["--dataset-revision", "v1"]):
        assert run([*arguments, *options]) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [each["dataset_revision"] for each in found] == read == list(commits.values())
    assert run([*arguments, "--dataset-revision", "none"]) == 2
    assert "cannot be read from the hub" in capfd.readouterr().err


def test_a_revision_of_a_file_is_refused(
    tiny_model: TinyModel, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset", str(text), "--dataset-revision", "v1"]
    assert run(["eval", str(tiny_model()), *LOCAL, *options]) == 2
    assert "--dataset-revision is of hub data sets" in capfd.readouterr().err
