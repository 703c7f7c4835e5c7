"""`prox24 eval --tasks`: lm-eval's own figures, from data that lies here, and their differences."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from cluster.command_line import run
from pipeline.evaluation.task_scores import Metric, task_metrics
from tests.support.tiny_models import save_tiny_model

LOCAL = ("--executor", "local", "--threads", "1", "--batch-size", "4", "--dtype", "float32")
YAML = """\
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}} ="
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task of 30 questions with choices of several lengths; lm-eval's cache is the test's own."""
    pytest.importorskip("lm_eval", reason="needs the extra prox24[tasks]")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    draw = random.Random(0)
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {
            "question": "".join(draw.choices("abcdef ", k=draw.randint(3, 30))),
            "choices": ["".join(draw.choices("ghij", k=draw.randint(1, 6))) for _ in range(4)],
            "answer": draw.randrange(4),
        }
        for _ in range(30)
    ]
    data = folder / "letters.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "letters.yaml").write_text(YAML.format(data=data))
    return folder


def by_lm_eval(model: Path, folder: Path, num_fewshot: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same task, by lm-eval's own model class with the whole model in memory."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # It would ask pip and the processor what they are.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    whole = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=1)
    return simple_evaluate(
        whole, tasks=["letters"], num_fewshot=num_fewshot, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )  # fmt: skip


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_tasks_are_lm_evals_own(
    tmp_path: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    num_fewshot: int,
) -> None:
    models = [save_tiny_model(tmp_path / f"model-{seed}", seed=seed) for seed in (0, 1)]
    options = [*LOCAL, "--tasks", "letters", "--tasks-folder", str(folder)]
    options += ["--num-fewshot", str(num_fewshot), "--workers", "2"]
    assert run(["eval", *map(str, models), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = [by_lm_eval(model, folder, num_fewshot, monkeypatch) for model in models]
    assert found["num_fewshot"] == {"letters": num_fewshot}
    capsys.readouterr()
    for metric in ("acc", "acc_norm"):
        own = [model["tasks"]["letters"][metric] for model in found["models"]]
        theirs = [e["results"]["letters"][f"{metric},none"] for e in expected]
        assert [figures["value"] for figures in own] == pytest.approx(theirs)
        assert 0 < own[0]["value"] < 1
        documents = [[s[metric] for s in e["samples"]["letters"]] for e in expected]
        differences = [b - a for a, b in zip(*documents, strict=True)]
        against = own[1]["against_first"]
        assert any(differences)
        assert against["difference"] == pytest.approx(statistics.fmean(differences))
        error = statistics.stdev(differences) / len(differences) ** 0.5
        assert against["standard_error"] == pytest.approx(error)
        assert "against_first" not in own[0]
        assert own[0]["documents"] == 30


def test_what_people_read(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "a-model-with-a-name-that-is-far-too-long-for-one-line")
    options = [*LOCAL, "--tasks", "letters", "--tasks-folder", str(folder), "--nsamples", "5"]
    assert run(["eval", str(model), str(model), *options]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "+0.0000 ± 0.0000" in printed
    assert "examples before each question: letters 0" in printed


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("output_type: multiple_choice", "output_type: generate_until"), "generate_until"),
        (("letters.jsonl", "missing.jsonl"), "data cannot be loaded"),
        # Looks through all of lm-eval's own tasks.
        pytest.param(("task: letters", "task: words"), "letters", marks=pytest.mark.slow),
        (('"{{choices}}"', "!function code.choices"), "--trust-remote-code allows it"),
    ],
)
def test_tasks_that_are_refused(
    tmp_path: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    complaint: str,
) -> None:
    path = folder / "letters.yaml"
    path.write_text(path.read_text().replace(*change))
    model = save_tiny_model(tmp_path / "model")
    options = [*LOCAL, "--tasks", "letters", "--tasks-folder", str(folder)]
    assert run(["eval", str(model), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("prox24: ")
    assert complaint in error


def test_options_of_tasks_alone_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "model", "--num-fewshot", "2"]) == 2
    assert "--tasks, which is not given" in capsys.readouterr().err


def test_metrics_that_are_no_means_have_no_standard_error() -> None:
    """A mean is paired document by document, in the documents' order; a maximum is not."""

    def results(values: list[float], best: float) -> dict[str, Any]:
        mean = statistics.fmean(values)
        samples = [
            {"doc_id": n, "filter": "none", "acc": value, "best": value}
            for n, value in reversed(list(enumerate(values)))
        ]
        own = {"alias": "t", "acc,none": mean, "acc_stderr,none": 1.0, "best,none": best}
        return {"results": {"t": own}, "samples": {"t": samples}}

    first = task_metrics(results([0, 1, 1, 0], 1))["t"]
    other = task_metrics(results([1, 1, 1, 0], 5))["t"]
    assert first.keys() == {"acc", "best"}
    assert first["acc"] == Metric(0.5, (0.0, 1.0, 1.0, 0.0))
    assert other["acc"].against(first["acc"]) == (0.25, 0.25)
    difference, error = other["best"].against(first["best"])
    assert (difference, error) == (4.0, pytest.approx(float("nan"), nan_ok=True))
