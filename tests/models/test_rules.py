"""Which layers are pruned, and how each: from the options to the job, its report and `verify`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.command_line import parse, run
from cluster.options import config_from
from pipeline.config.layers import ALL_BLOCKS, Override, parse_blocks, parse_overrides
from pipeline.config.prune import ModelOptions, PruneConfig
from pipeline.config.solver import SolverSettings
from pipeline.loop.rank import Call
from pipeline.messages import Outcome
from pipeline.models.forward_capture import LayerGroup
from pipeline.output.verify import verify
from pipeline.planning.shapes.model import read_shape
from pipeline.worker.local_executor import LocalExecutor
from pipeline.worker.solve import deal_rows, split_groups
from storage.errors import ConfigError
from tests.support.jobs import contents, fits, prune_here, tensors
from tests.support.plain_prune import job_tokens, prune_in_memory
from tests.support.tiny_models import save_tiny_model

TinyModel = Callable[..., Path]
DOWN = "model.layers.1.mlp.down_proj"


def chosen(name: str = DOWN, block: int = 1, **options: Any) -> tuple[str | None, str | None]:
    """Method and pattern of a layer of a model of four blocks, width 64; None if it is dense."""
    choice = ModelOptions(**options).layer_rules().choose(name, block, 4, 64)
    assert (choice.settings is None) != (choice.reason is None)
    return (choice.settings.method, choice.settings.pattern) if choice.settings else (None, None)


DEFAULT, DENSE = ("prox_admm", "2:4"), (None, None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, DEFAULT),
        ({"include": r".*\.mlp\..*"}, DEFAULT),
        ({"include": r"mlp"}, DENSE),
        ({"include": r".*self_attn.*"}, DENSE),
        ({"exclude": r"lm_head|.*down_proj"}, DENSE),
        ({"exclude": r"down_proj"}, DEFAULT),
        ({"include": r".*mlp.*", "exclude": r".*\.1\..*"}, DENSE),
        ({"blocks": "0,1"}, DEFAULT),
        ({"blocks": "1-"}, DEFAULT),
        ({"blocks": "2-3"}, DENSE),
        ({"blocks": "0"}, DENSE),
        ({"dense_first": 1}, DEFAULT),
        ({"dense_first": 2}, DENSE),
        ({"dense_last": 2}, DEFAULT),
        ({"dense_last": 3}, DENSE),
        ({"override": "*.down_proj=wanda"}, ("wanda", "2:4")),
        ({"override": "*.down_proj=4:8"}, ("prox_admm", "4:8")),
        ({"override": "*.down_proj=4:8, sparsegpt"}, ("sparsegpt", "4:8")),
        ({"override": "*.down_proj=dense"}, DENSE),
        ({"override": "*.up_proj=wanda"}, DEFAULT),
        ({"override": "*.down_proj=dense; *.1.*=wanda"}, ("wanda", "2:4")),
        ({"override": "*.1.*=wanda;*.down_proj=dense"}, DENSE),
        ({"override": "*.down_proj=wanda", "exclude": ".*down.*"}, DENSE),
        ({"method": "magnitude", "pattern": "1:4", "override": "*=wanda"}, ("wanda", "1:4")),
    ],
)
def test_what_the_options_say_of_a_layer(
    options: dict[str, Any], expected: tuple[str | None, str | None]
) -> None:
    assert chosen(**options) == expected


def test_an_overriding_method_has_its_own_defaults() -> None:
    rules = ModelOptions(method="wanda", override="*.down_proj=sparsegpt").layer_rules()
    assert rules.overrides[0][1] == SolverSettings(method="sparsegpt", blocksize=128).resolved()


def test_blocks() -> None:
    assert parse_blocks(None) is None
    assert parse_blocks("4-27") == (range(4, 28),)
    assert parse_blocks(" 0, 2 ,8-") == (range(1), range(2, 3), range(8, ALL_BLOCKS))


def test_overrides() -> None:
    assert parse_overrides(None) == ()
    assert parse_overrides("a=b=wanda;") == (Override("a=b", "wanda", None, False),)


@pytest.mark.parametrize(
    "options",
    [
        {"blocks": "4-2"},
        {"blocks": "one"},
        {"blocks": "-3"},
        {"blocks": ""},
        {"include": "("},
        {"exclude": "*.down_proj"},
        {"override": "*.down_proj"},
        {"override": "=wanda"},
        {"override": "*.down_proj=wandas"},
        {"override": "*.down_proj=wanda,dense"},
        {"override": "*.down_proj=wanda,wanda"},
        {"override": "*.down_proj=4:2"},
        {"dense_first": -1},
    ],
)
def test_options_that_cannot_be_read(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--|pattern"):
        ModelOptions(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"blocks": "0-2"}, "2 blocks"),
        ({"blocks": "5-"}, "2 blocks"),
        ({"include": "down_proj"}, "model.layers.0.self_attn.q_proj"),
        ({"exclude": ".*router.*"}, "router"),
        ({"override": "*.dwn_proj=wanda"}, "dwn_proj"),
        ({"override": "*.q_proj=3:5"}, "divisible by 5"),
        ({"dense_first": 2}, "no layer is left"),
        ({"method": "wanda", "pattern": "1:4", "override": "*.q_proj=prox"}, "1:4"),
    ],
)
def test_options_that_name_nothing_are_refused(
    tiny_model: TinyModel, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(Exception, match=named) as caught:
        prune_here(tiny_model(), tmp_path / "output", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "output").exists()


def test_an_option_given_again_is_added() -> None:
    arguments = ["prune", "m", "o", "--override", "*.q_proj=wanda", "--override", "*.v_proj=dense"]
    config = config_from(parse(arguments), PruneConfig)
    assert config.override == "*.q_proj=wanda;*.v_proj=dense"


def test_a_group_is_parted_where_settings_differ() -> None:
    wanda, admm = SolverSettings(method="wanda"), SolverSettings()
    settings = {"q": admm, "k": wanda, "v": admm, "o": admm}
    groups = split_groups((LayerGroup(("q", "k", "v"), 8), LayerGroup(("o",), 8)), settings)
    assert groups == (LayerGroup(("q", "v"), 8), LayerGroup(("k",), 8), LayerGroup(("o",), 8))


def test_rows_are_dealt_by_each_groups_own_settings() -> None:
    """What compares a layer's rows is not cut; what does not is, whatever else is there."""
    whole = SolverSettings(method="magnitude", pattern="unstructured:0.5")
    settings = {"a": SolverSettings(), "b": whole}
    groups = (LayerGroup(("a",), 64), LayerGroup(("b",), 64))
    dealt = deal_rows(settings, groups, {"a": (64, 64), "b": (64, 64)}, 2, "cpu")
    assert [own["a"] for own in dealt] == [(0, 32), (32, 64)]
    assert [own["b"] for own in dealt if "b" in own] == [(0, 64)]


MIXED: dict[str, Any] = {
    "method": "sparsegpt",
    "damping": 0.1,
    "dense_first": 1,
    "blocks": "0-2",
    "exclude": r".*\.v_proj",
    "override": "*.down_proj=wanda;*.k_proj=4:8;*.o_proj=dense",
}
PRUNED = {"q_proj": "2:4", "k_proj": "4:8", "gate_proj": "2:4", "up_proj": "2:4"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of four blocks, and what a job with other settings for some layers made of it."""
    folder = tmp_path_factory.mktemp("mixed")
    source = save_tiny_model(folder / "model", blocks=4)
    return source, Path(str(prune_here(source, folder / "output", **MIXED).output))


def test_a_job_with_other_settings_for_some_layers(mixed: tuple[Path, Path]) -> None:
    source, output = mixed
    before = dict(tensors(source))
    changed = {n: t for n, t in tensors(output) if not torch.equal(t, before[n])}
    own = PRUNED | {"down_proj": "2:4"}
    assert {name.rpartition(".w")[0].rpartition(".")[2] for name in changed} == own.keys()
    assert {name.split(".")[2] for name in changed} == {"1", "2"}
    for name, weight in changed.items():
        keep, group = map(int, own[name.split(".")[-2]].split(":"))
        assert fits(weight, keep, group)
    assert not fits(changed["model.layers.1.self_attn.k_proj.weight"], 2, 4)
    assert verify(output, source).problems == []


def test_a_job_with_other_settings_equals_the_plain_one(
    mixed: tuple[Path, Path], tmp_path: Path
) -> None:
    source, output = mixed
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    tokens = job_tokens(source, output.parent / "text.txt")
    settings: dict[str, SolverSettings] = {}
    for block in (1, 2):
        for layer in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.k_proj"):
            pattern = PRUNED[layer.split(".")[1]]
            settings[f"model.layers.{block}.{layer}"] = SolverSettings(
                method="sparsegpt", damping=0.1, shrinkage=0.0, pattern=pattern
            )
        settings[f"model.layers.{block}.mlp.down_proj"] = SolverSettings(method="wanda")
    for block in (1, 2):
        names = [name for name in settings if f".{block}." in name]
        # In one forward: inputs are those of the dense block.
        prune_in_memory(model, tokens, [names], {name: settings[name] for name in names})
    found = dict(tensors(output))
    for name in settings:
        expected = model.get_submodule(name).weight
        difference = (found[f"{name}.weight"] - expected).norm()
        assert difference < 0.01 * expected.norm(), name


def test_what_is_recorded(mixed: tuple[Path, Path]) -> None:
    _, output = mixed
    results = json.loads((output / "prox24.json").read_text())
    for name, value in MIXED.items():
        assert results["job"]["settings"][name] == value
    layers = {layer["name"]: (layer["method"], layer["pattern"]) for layer in results["layers"]}
    assert layers[DOWN] == ("wanda", "2:4")
    assert layers["model.layers.2.self_attn.k_proj"] == ("sparsegpt", "4:8")
    because = results["skipped_because"]
    assert list(because) == results["skipped_layers"]
    assert len(because) + len(layers) == 4 * 7
    assert because["model.layers.0.mlp.up_proj"] == "--dense-first 1"
    assert because["model.layers.3.mlp.up_proj"] == "not in --blocks 0-2"
    assert because["model.layers.1.self_attn.v_proj"] == r"--exclude .*\.v_proj"
    assert because["model.layers.1.self_attn.o_proj"] == "--override *.o_proj=dense"
    card = (output / "README.md").read_text()
    assert "*.down_proj=wanda" in card
    summary = json.loads((output.parent / "output.run" / "report" / "summary.json").read_text())
    layers_of = [set(block["layers"]) for block in summary["blocks"]]
    assert layers_of[0] == layers_of[3] == set()
    assert summary["blocks"][1]["layers"]["mlp.down_proj"]["statistic"] == "diagonal"


@pytest.mark.slow
def test_the_report_says_why_layers_are_dense(mixed: tuple[Path, Path]) -> None:
    run_directory = mixed[1].parent / "output.run"
    assert run(["report", str(run_directory)]) == 0
    page = (run_directory / "report" / "report.html").read_text()
    assert "Left dense (not in --blocks 0-2): model.layers.3.self_attn.q_proj," in page


def test_verify_holds_the_layers_against_the_jobs_options(
    mixed: tuple[Path, Path], tmp_path: Path
) -> None:
    """A layer that was left dense, or pruned otherwise, and is said to have been meant so."""
    source, output = mixed
    copy = Path(shutil.copytree(output, tmp_path / "output"))
    path = copy / "prox24.json"
    results = json.loads(path.read_text())
    del results["job"]["settings"]["override"]
    path.write_text(json.dumps(results))
    found = verify(copy, source).problems
    assert "model.layers.1.self_attn.o_proj: dense, but the job's options say 2:4" in found
    assert "model.layers.1.self_attn.k_proj: 4:8, but the job's options say 2:4" in found
    results["job"]["settings"]["dense_first"] = 2
    path.write_text(json.dumps(results))
    message = "model.layers.1.mlp.up_proj: 2:4, but the job's options say dense"
    assert message in verify(copy, source).problems


def test_a_job_on_several_workers_goes_on_after_dense_blocks(
    mixed: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two ranks give the bytes that two ranks give after the job was stopped in between."""
    source, output = mixed
    text = str(output.parent / "text.txt")
    whole = prune_here(source, tmp_path / "whole", workers=2, dataset=text, **MIXED).output

    class Stopped(Exception):
        pass

    class Stops(LocalExecutor):
        def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
            if calls[0].phase == "solve" and calls[0].block == 2:
                raise Stopped
            return super().run(calls)

    with pytest.raises(Stopped):
        prune_here(
            source, tmp_path / "again", workers=2, dataset=text, executor=Stops(2, 1), **MIXED
        )
    again = prune_here(source, tmp_path / "again", workers=2, dataset=text, **MIXED).output
    assert contents(Path(str(whole))) == contents(Path(str(again)))


def test_where_something_is_chosen_overrides_choose_nothing(
    mixed: tuple[Path, Path], tmp_path: Path
) -> None:
    """--shrinkage auto is the job's method's: others have no full Hessian to choose on."""
    override = "*.down_proj=wanda;*.o_proj=magnitude;*.k_proj=sparsegpt"
    options = MIXED | {"method": "prox_admm", "shrinkage": "auto", "override": override}
    text = str(mixed[1].parent / "text.txt")
    jobs = [
        prune_here(mixed[0], tmp_path / str(workers), workers=workers, dataset=text, **options)
        for workers in (1, 2)
    ]
    layers = jobs[0].summary["blocks"][1]["layers"]
    assert layers["mlp.down_proj"]["statistic"] == "diagonal"
    chosen = json.loads((jobs[0].run_directory / "choices" / "block-001.json").read_text())
    shrinkages = {name: own.get("shrinkage") for name, own in chosen["groups"].items()}
    assert shrinkages["mlp.down_proj"] is None
    assert isinstance(shrinkages["mlp.gate_proj"], float)
    one, two = (contents(job.output) for job in jobs)
    assert one == two


def test_the_plan_counts_what_is_pruned(mixed: tuple[Path, Path]) -> None:
    source, _ = mixed
    rules = ModelOptions(**MIXED).layer_rules()
    shape = read_shape(source, seqlen=32, rules=rules)
    assert [len(shape.kind(block).groups) > 0 for block in range(4)] == [False, True, True, False]
    pruned = {name for group in shape.kind(1).groups for name, _, _ in group.layers}
    assert pruned == {
        "self_attn.q_proj",
        "self_attn.k_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    }
    with pytest.raises(ConfigError, match="dwn"):
        slip = ModelOptions(override="*.dwn_proj=wanda").layer_rules()
        read_shape(source, seqlen=32, rules=slip)


@pytest.mark.parametrize("more", [(), ("--shrinkage", "auto", "--gpus", "2")])
def test_the_plan_is_printed(
    mixed: tuple[Path, Path], more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", str(mixed[0]), "--seqlen", "32", "--dense-first", "1", *more]
    assert run(arguments) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
