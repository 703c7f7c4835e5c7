"""An option that was given has an effect, or is refused; what has one is declared beside it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cluster.command_line import COMMANDS, command_named, make_parser, parse, run
from cluster.options import config_from, path_text, path_texts
from pipeline.config.effect import unused_options
from pipeline.config.evaluate import EvalConfig
from pipeline.config.fields import declaration
from pipeline.config.methods import METHODS, method_facts
from pipeline.config.prune import PruneConfig
from pipeline.config.solve import SolveConfig
from pipeline.config.solver import SolverSettings
from pipeline.doctor.options import DoctorConfig
from pipeline.planning.options import PlanConfig
from pipeline.solvers.registry import solver_class, solver_for
from pipeline.solvers.types import Statistics
from pipeline.speed.options import BenchConfig
from tests.support.jobs import tensors, write_text
from tests.support.moe_models import save_moe
from tests.support.refusals import LOCAL, refuse

TinyModel = Callable[..., Path]

# Option -> a config in which it has no effect, and one in which it has. Every option of every
# command is here, or in ALWAYS: a new one has to be put into one of them.
LOCALLY = ({"executor": "local"}, {"executor": "ray"})
WANDA = ({"method": "wanda"}, {"method": "wanda", "refine": "cg"})
MAGNITUDE = ({"method": "magnitude"}, {"method": "wanda"})
WANDA_ONLY = ({"method": "wanda", "refine": "cg"}, {"method": "sparsegpt"})
SOLVER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "damping": WANDA,
    "shrinkage": WANDA,
    "refine_steps": ({"method": "prox_admm", "refine": "none"}, {"method": "prox_admm"}),
    "blocksize": ({"method": "prox"}, {"method": "prox", "override": "*.down_proj=sparsegpt"}),
    "prox_lambda": ({"method": "prox_admm"}, {"method": "wanda", "override": "*q*=prox,2:4"}),
    "prox_growth": ({"method": "sparsegpt", "override": "*=dense"}, {"method": "prox"}),
    "kernels": WANDA_ONLY,
}
CALIBRATED = dict.fromkeys(("dtype", "batch_size", "nsamples", "seqlen"), MAGNITUDE)
EXPERTS = dict.fromkeys(("expert_tokens", "calibrate_all_experts"), MAGNITUDE)
HESSIANS = {"hessian_memory": WANDA}
RECONSTRUCTION = dict.fromkeys(
    ("reconstruct_epochs", "reconstruct_batch", "reconstruct_lr", "reconstruct_target",
     "reconstruct_mask", "reconstruct_norms"),
    ({"method": "wanda"}, {"method": "wanda", "reconstruct": "block"}),
)  # fmt: skip
RAY = dict.fromkeys(
    ("gpus_per_worker", "ray_address", "open_dashboard", "phase_timeout", "on_lost_node",
     "node_wait", "placement_timeout", "network_interface", "collective"),
    LOCALLY,
)  # fmt: skip
WITH_TASKS = ({"tasks": "arc_easy"}, {})
BY_METHODS = {
    name: ({"methods": "wanda,magnitude"}, {"methods": "wanda,prox", "refine": "cg"})
    for name in ("damping", "shrinkage", "refine_steps", "prox_lambda", "prox_growth", "kernels")
}
CONDITIONAL: dict[type[Any], dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    PruneConfig: SOLVER | CALIBRATED | EXPERTS | HESSIANS | RECONSTRUCTION | RAY | {
        "dataset": MAGNITUDE,
        "seed": ({"method": "magnitude", "eval_dataset": "x"}, {"save_layers": "*"}),
        **dict.fromkeys(
            ("text_column", "chat_template", "bos"),
            ({"method": "magnitude"}, {"method": "magnitude", "eval_dataset": "x"}),
        ),
        "calibrate_on": MAGNITUDE,
        "attn_implementation": ({"method": "magnitude"}, {"method": "magnitude", "refine": "cg"}),
        "scratch_dir": ({"method": "magnitude"}, {"method": "magnitude", "save_layers": "*"}),
        "eval_nsamples": ({}, {"eval_dataset": "x"}),
    },
    EvalConfig: RAY | dict.fromkeys(
        ("dataset", "text_column", "chat_template", "bos", "dataset_revision", "seqlen"), WITH_TASKS
    ),
    SolveConfig: BY_METHODS | {"blocksize": ({"methods": "prox"}, {"methods": "all"})},
    PlanConfig: SOLVER | CALIBRATED | EXPERTS | HESSIANS | RECONSTRUCTION | {
        "gpu": ({}, {"gpus": 8}),
        "gpu_memory": ({}, {"gpus": 8}),
        "threads": ({"gpus": 8}, {}),
    },
    BenchConfig: {},
    DoctorConfig: dict.fromkeys(("ray_address", "network_interface", "open_dashboard"), LOCALLY),
}  # fmt: skip
_EVERYWHERE = {"device", "workers", "threads", "trace", "trust_remote_code", "verbose", "debug"}
_OF_LAYERS = {"include", "exclude", "blocks", "dense_first", "dense_last", "override",
              "skip_unsupported", "pattern", "refine", "method", "reconstruct"}  # fmt: skip
ALWAYS: dict[type[Any], set[str]] = {
    PruneConfig: _EVERYWHERE | _OF_LAYERS | {
        "executor", "eval_dataset", "save_layers", "run_dir", "no_report", "overwrite", "force",
        "max_attempts",
    },
    # --tasks-folder and --num-fewshot without --tasks are refused by the config itself.
    EvalConfig: _EVERYWHERE | {
        "executor", "dtype", "attn_implementation", "batch_size", "nsamples", "json", "scratch_dir",
        "tasks", "tasks_folder", "num_fewshot",
    },
    SolveConfig: {
        "pattern", "refine", "methods", "fit_sequences", "evaluate_sequences", "output", "json",
        "threads", "device", "verbose", "debug",
    },
    PlanConfig: _OF_LAYERS | {
        "gpus", "nodes", "node_memory", "workers", "disk", "disk_speed", "network_speed", "rates",
        "calibrate", "executor", "trust_remote_code", "json", "verbose", "debug",
    },
    BenchConfig: {
        "batch_sizes", "dtype", "seqlen", "repeats", "json", "trust_remote_code", "verbose",
        "debug",
    },
    DoctorConfig: {"executor", "folder", "timeout", "json", "verbose", "debug"},
}  # fmt: skip

# Declared with a condition for another command; an evaluation always runs the model.
ALWAYS_IN = {EvalConfig: {"dtype", "attn_implementation", "batch_size"}}


@pytest.mark.parametrize("kind", CONDITIONAL)
def test_every_option_says_when_it_has_no_effect(kind: type[Any]) -> None:
    declared = {f.name: d for f in dataclasses.fields(kind) if (d := declaration(f)) is not None}
    conditional = {name for name, d in declared.items() if d.unused is not None}
    conditional -= ALWAYS_IN.get(kind, set())
    assert conditional == CONDITIONAL[kind].keys()
    assert declared.keys() - conditional == ALWAYS[kind]
    for name, (without, with_one) in CONDITIONAL[kind].items():
        noted = declared[name].is_noted(kind(**without))
        reasons = unused_options(kind(**without), [name], noted=noted)
        assert list(reasons) == [name], name
        assert not unused_options(kind(**without), [name], noted=not noted)
        assert not unused_options(kind(**without), [], noted=noted)
        assert not unused_options(kind(**with_one), [name], noted=noted), name


def test_every_command_with_options_of_its_own_is_among_them() -> None:
    kinds = {command_named(name).config for name in COMMANDS} - {None}
    assert kinds == CONDITIONAL.keys() == ALWAYS.keys()


# -- methods --------------------------------------------------------------------------------------

# Another value for each setting of a solver that a method may read.
OTHERS: dict[str, Any] = {
    "damping": 0.7, "shrinkage": 0.5, "blocksize": 8, "refine_steps": 2, "prox_lambda": 0.2,
    "prox_growth": 1.3, "kernels": "torch",
}  # fmt: skip


class Watched(SolverSettings):
    """Settings that know what is read of them."""

    def __getattribute__(self, name: str) -> Any:
        seen = SEEN
        if seen is not None:
            seen.add(name)
        return super().__getattribute__(name)


SEEN: set[str] | None = None


def solved(settings: SolverSettings) -> tuple[torch.Tensor, set[str]]:
    """The pruned weight of a layer, and which settings were read for it."""
    global SEEN
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    inputs = torch.randn(80, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    hessian = inputs.T @ inputs
    statistics = Statistics(
        columns=64, tokens=80, sequences=4, diagonal=hessian.diagonal().clone(), hessian=hessian
    )
    solver = solver_for(settings)
    SEEN = set()
    try:
        found = solver.solve(weight, solver.prepare(statistics)).weight
    finally:
        seen, SEEN = SEEN, None
    return found, seen


@pytest.mark.parametrize("refine", ["none", "cg"])
@pytest.mark.parametrize("option", OTHERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_what_it_declares(method: str, option: str, refine: Any) -> None:
    """What it does not declare changes nothing; what it declares is read for its result."""
    plain = Watched(method=method, refine=refine)
    before, seen = solved(plain)
    after, _ = solved(dataclasses.replace(plain, **{option: OTHERS[option]}))
    if option in plain.resolved().reads():
        assert option in seen or option == "kernels"
        # Of SparseGPT's block size the result depends by rounding alone, and not always.
        # What a GPU computes with is not read on a CPU.
        assert option in ("blocksize", "kernels") or not torch.equal(before, after)
    else:
        assert torch.equal(before, after)
    assert plain.resolved().needs() == solver_for(plain).needs


def test_the_values_tried_are_those_of_all_settings() -> None:
    asked = {name for name, d in _declared(SolverSettings).items() if d.unused is not None}
    assert asked == OTHERS.keys()
    for method in METHODS:
        facts, solver = method_facts(method), solver_class(method)
        assert (facts.statistic, facts.method_settings) == (
            solver.statistic, solver.method_settings,
        )  # fmt: skip


def _declared(kind: type[Any]) -> dict[str, Any]:
    return {f.name: d for f in dataclasses.fields(kind) if (d := declaration(f)) is not None}


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("--gpus-per-worker 1", ("--gpus-per-worker", "--executor local")),
        ("--ray-address auto", ("--ray-address has no effect",)),
        ("--placement-timeout 300", ("--placement-timeout",)),  # its default
        ("--node-wait 1 --on-lost-node wait", ("--on-lost-node and --node-wait have no",)),
        (
            "--network-interface x --open-dashboard",
            ("--open-dashboard and --network-interface",),
        ),
        ("--scratch-dir /tmp --method magnitude", ("--scratch-dir", "needs no calibration")),
        ("--prox-lambda 0.001", ("--prox-lambda", "method prox_admm does not use it")),
        ("--prox-growth 1.1 --method wanda", ("--prox-growth", "wanda")),
        ("--blocksize 128 --method prox", ("--blocksize", "method prox")),
        ("--refine-steps 3 --refine none", ("--refine-steps", "--refine")),
        ("--damping 0.1 --shrinkage 0.1 --method magnitude", ("--damping and --shrinkage have",)),
        ("--damping 0.1 --method wanda", ("--damping", "wanda")),
        ("--eval-nsamples 3", ("--eval-nsamples", "--eval-dataset is not given")),
        ("--expert-tokens 16", ("--expert-tokens", "expert")),
        ("--calibrate-all-experts", ("--calibrate-all-experts", "expert")),
        ("--hessian-memory 1 --method wanda", ("--hessian-memory", "needs no Hessian")),
        ("--save-layers *.9.*", ("--save-layers *.9.*", "model.layers.0")),
        (
            "--blocksize 64 --method wanda --override *.q_proj=magnitude",
            ("--blocksize", "none of the methods wanda, magnitude uses it"),
        ),
        ("--text-column body", ("--text-column", "text.txt")),
    ],
)
def test_prune_refuses_what_would_do_nothing(
    tiny_model: TinyModel,
    tmp_path: Path,
    text: Path,
    capfd: pytest.CaptureFixture[str],
    options: str,
    names: tuple[str, ...],
) -> None:
    arguments = ["prune", tiny_model(), tmp_path / "output", *LOCAL, "--dataset", text]
    refuse([*arguments, "--nsamples", 4, *options.split()], tmp_path, capfd, *names)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["eval", "MODEL", "--tasks", "arc_easy", "--seqlen", "2048"], ("--seqlen", "--tasks")),
        (["eval", "MODEL", "--tasks", "x", "--dataset", "TEXT"], ("--dataset", "--tasks")),
        (["eval", "MODEL", "--num-fewshot", "1"], ("--num-fewshot", "--tasks")),
        (["eval", "MODEL", *LOCAL, "--dataset", "TEXT", "--dataset-revision", "v1"],
         ("--dataset-revision",)),
        (["solve", "LAYER", "--methods", "wanda", "--blocksize", "64"], ("--blocksize",)),
        (["plan", "MODEL", "--gpu", "H100"], ("--gpu ", "--gpus")),
        (["plan", "MODEL", "--seqlen", "32", "--expert-tokens", "9"], ("--expert-tokens",)),
        (["plan", "MODEL", "--method", "wanda", "--hessian-memory", "1"], ("--hessian-memory",)),
        (["plan", "MODEL", "--gpus", "2", "--threads", "4"], ("--threads", "--gpus")),
    ],
)  # fmt: skip
def test_other_commands_refuse_it_too(
    tiny_model: TinyModel,
    tmp_path: Path,
    text: Path,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    names: tuple[str, ...],
) -> None:
    stands = {"MODEL": tiny_model(), "TEXT": text, "LAYER": text}
    refuse([stands.get(each, each) for each in arguments], tmp_path, capfd, *names)


def test_it_is_the_same_in_yaml(
    tiny_model: TinyModel, tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also with the default as the value; a flag that is false, or null, was not given."""
    file = tmp_path / "job.yaml"
    arguments = ["prune", tiny_model(), tmp_path / "output", *LOCAL, "--dataset", text]
    arguments += ["--nsamples", 4, "--config", file, "--no-report"]
    file.write_text("gpus_per_worker: 0\nnode-wait: 300.0\n")
    refuse(arguments, tmp_path, capfd, "--gpus-per-worker and --node-wait have no effect")
    file.write_text("open-dashboard: false\nray-address: null\n")
    assert run([str(argument) for argument in arguments]) == 0


def test_an_option_is_used_if_any_layer_uses_it(
    tiny_model: TinyModel, tmp_path: Path, text: Path
) -> None:
    arguments = ["prune", tiny_model(), tmp_path / "output", *LOCAL, "--dataset", text]
    arguments += ["--nsamples", 4, "--no-report", "--method", "wanda"]
    arguments += ["--override", "*.down_proj=prox", "--prox-lambda", 0.01, "--damping", 0.1]
    assert run([str(argument) for argument in arguments]) == 0


def test_experts_use_the_options_of_experts(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save_moe(tmp_path / "model", "mixtral")
    arguments = ["prune", model, tmp_path / "output", *LOCAL, "--dataset", text]
    arguments += ["--nsamples", 4, "--no-report", "--expert-tokens", 2]
    refuse([*arguments, "--exclude", ".*experts.*"], tmp_path, capfd, "--expert-tokens")
    assert run([str(argument) for argument in arguments]) == 0


def test_magnitude_takes_the_options_of_the_text_and_says_that_they_change_nothing(
    tiny_model: TinyModel, tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """So that a command stays the same when its --method changes."""
    model, found = tiny_model(), []
    for number, more in enumerate((["--nsamples", "4"], ["--nsamples", "5", "--seed", "3"])):
        output = tmp_path / f"output{number}"
        arguments = ["prune", model, output, *LOCAL, "--dataset", text, "--no-report", *more]
        capfd.readouterr()
        assert run([*map(str, arguments), "--method", "magnitude"]) == 0
        (note,) = [n for n in capfd.readouterr().err.splitlines() if n.startswith("note: ")]
        for option in ("--dataset", "--nsamples", "--seqlen", "--batch-size"):
            assert option in note
        assert "change nothing: method magnitude needs no calibration" in note
        assert ("--seed" in note) == bool(number)
        found.append(dict(tensors(output)))
        assert run([*map(str, arguments[:2]), str(tmp_path / f"wanda{number}"),
                    *map(str, arguments[3:]), "--method", "wanda"]) == 0  # fmt: skip
        assert "note: " not in capfd.readouterr().err
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


SWEEP: dict[str, Any] = {"lines": {"w": {"method": "wanda"}, "s": {"method": "sparsegpt"}}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prune": {"prox-lambda": 0.1}}, ("prune", "--prox-lambda", "wanda", "sparsegpt")),
        ({"prune": {"blocksize": 64}}, None),  # a line uses it
        ({"lines": {"w": {"method": "wanda", "blocksize": 64}, "s": {"method": "sparsegpt"}}},
         ("lines: w", "--blocksize")),
        ({"vary": {"prox-growth": [1.1, 1.2]}}, ("vary", "--prox-growth", "same job")),
        ({"vary": {"blocksize": [64]}}, None),
        ({"prune": {"node-wait": 300}}, ("--node-wait", "local")),
        ({"prune": {"method": "prox"}}, ("prune: method", "every line")),
        ({"prune": {"debug": True}}, ("debug",)),
        ({"eval": {"tasks": "arc_easy"}}, ("eval: tasks", "perplexity")),
        ({"eval": {"gpus-per-worker": 0}}, ("eval: --gpus-per-worker",)),
    ],
)  # fmt: skip
def test_a_sweep_uses_what_any_of_its_runs_uses(
    tiny_model: TinyModel,
    tmp_path: Path,
    text: Path,
    capfd: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    told: tuple[str, ...] | None,
) -> None:
    shared = {"executor": "local", "threads": 1, "dataset": str(text), "seqlen": 32,
              "no-report": True}  # fmt: skip
    plan = {"model": str(tiny_model()), "folder": str(tmp_path / "sweep")} | SWEEP
    plan |= {"vary": {"nsamples": [4]}, **changes}
    plan["prune"] = shared | changes.get("prune", {})
    plan["eval"] = {"dataset": str(text), "seqlen": 32, "nsamples": 4} | changes.get("eval", {})
    if "nsamples" not in plan["vary"]:
        plan["prune"]["nsamples"] = 4
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(plan))
    arguments = ["sweep", "--config", str(tmp_path / "sweep.yaml")]
    if told is None:
        assert run(arguments) == 0
    else:
        refuse(arguments, tmp_path, capfd, "sweep.yaml", *told)


# -- what was given -------------------------------------------------------------------------------


def test_a_config_knows_what_was_given_and_is_the_same_config(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("nsamples: 128\noverwrite: false\n")
    options = parse(["prune", "m", "o", "--config", str(file), "--workers", "auto", "--verbose"])
    config = config_from(options, PruneConfig)
    assert config.given == {"nsamples", "workers", "verbose"}
    assert config == PruneConfig(verbose=True)
    assert "given" not in json.dumps(config.what())


# -- paths ----------------------------------------------------------------------------------------

# Options and arguments whose value is a text and no path on this machine.
NO_PATHS = {
    "damping", "shrinkage", "blocksize", "pattern", "methods", "include", "exclude", "blocks",
    "override", "save_layers", "text_column", "ray_address", "device", "network_interface",
    "attn_implementation", "tasks", "dataset_revision", "fit_sequences", "evaluate_sequences",
    "gpu", "gpu_memory", "node_memory", "disk", "disk_speed", "network_speed", "batch_sizes",
}  # fmt: skip
# Expanded on each node.
ON_NODES = {("prune", "scratch_dir")}


def test_every_text_is_a_path_in_which_home_is_known_or_is_named_here() -> None:
    (commands,) = (
        action
        for action in make_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    found = set()
    for name, parser in commands.choices.items():
        for action in parser._actions:
            if action.nargs == 0 or action.choices is not None or action.type in (int, float):
                continue
            if action.dest == "workers":
                continue
            several = getattr(action.type, "func", None) is path_texts
            if action.type is path_text or several:
                found.add(action.dest)
            else:
                assert action.dest in NO_PATHS or (name, action.dest) in ON_NODES, (name, action)
    assert found >= {
        "model", "models", "output", "source", "run_dir", "runs", "layer", "config", "dataset",
        "eval_dataset", "trace", "tasks_folder", "scratch_dir", "rates", "folder",
    }  # fmt: skip
