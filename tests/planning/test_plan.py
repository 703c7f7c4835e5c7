"""The plan: its parts add up, more workers are never slower, what does not fit is told."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.command_line import run
from cluster.commands.plan import plan_text
from pipeline.planning.options import PlanConfig, planned_job, size_of
from pipeline.planning.parts.solve_parts import group_parts
from pipeline.planning.plan import Plan, with_workers
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.rates import GPUS, Rates, cpu_rates, gpu_rates, load_rates, save_rates
from pipeline.planning.shapes.model import ModelShape, read_shape
from pipeline.planning.to_json import plan_to_json
from pipeline.runtime.free_memory import available_memory
from pipeline.runtime.units import size_text
from storage.errors import ConfigError
from tests.planning.test_plan_counts import config_only, job_of

# The phases that compute: more workers share their work.
SHARED = ("calibrate", "advance", "solve")


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    """A model too large for a test to run, of 12 blocks."""
    path = config_only(
        tmp_path_factory.mktemp("config"), blocks=12, hidden=4096, intermediate=8192,
        num_attention_heads=32, positions=4096,
    )  # fmt: skip
    return read_shape(path, seqlen=1024)


def on_gpus(shape: ModelShape, count: int, **options: Any) -> PlannedJob:
    job = job_of(shape, rates=gpu_rates("H100"), nsamples=128, batch_size=4, **options)
    return replace(job, workers=count, device_memory=80e9)


def test_wide_inverses_are_divided_over_gpus_that_share_a_layer(tmp_path: Path) -> None:
    path = config_only(
        tmp_path, blocks=2, hidden=8192, intermediate=28_672, num_attention_heads=64,
        positions=4096,
    )  # fmt: skip
    shape = read_shape(path, seqlen=1024)
    job, kind = on_gpus(shape, 8), shape.kinds[0]
    shares = job.deal(kind)
    wide = max(kind.groups, key=lambda group: group.columns)
    sizes = {share.team for each in shares for share in each if share.group == wide}
    (team,) = sizes
    assert team == sum(share.rows > 0 for each in shares for share in each if share.group == wide)
    assert team > 1
    assert all(share.team == 1 for each in shares for share in each if share.group != wide)
    assert all(each[0].group == wide for each in shares), "those that wait for others come first"
    alone, divided = (
        {part.what: part.seconds for part in group_parts(job, wide, 1024, size)}
        for size in (1, team)
    )
    inverse = alone.pop("inverse, same on all")
    assert divided.pop("inverse, divided") == pytest.approx(inverse / team)
    assert 0 < divided.pop("inverse, sent") + divided.pop("inverse, steps") < inverse / 2
    assert divided == alone
    for other in (replace(job, in_process=True), replace(job, rates=cpu_rates())):
        assert all(share.team == 1 for each in other.deal(kind) for share in each)


# -- sums and orders -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "prox", "prox_admm"])
def test_the_parts_add_up(shape: ModelShape, method: str) -> None:
    plan = Plan(on_gpus(shape, 8, method=method))
    assert sum(total["seconds"] for total in plan.totals().values()) == pytest.approx(plan.seconds)
    assert sum(block.count for block in plan.blocks) == 12
    assert next(block.first for block in plan.blocks) == 0
    assert all(part.seconds >= 0 for _, _, phase in plan.phases() for part in phase.parts)
    names = set(plan.totals())
    assert ("advance" in names) == (method != "magnitude")
    # The last block's outputs are no block's inputs; every other block has a phase that makes it.
    if method != "magnitude":
        assert plan.totals()["advance"]["count"] == 11


@settings(max_examples=30, deadline=None)
@given(workers=st.integers(1, 64), factor=st.integers(2, 4))
def test_more_workers_are_not_slower_where_work_is_shared(
    shape: ModelShape, workers: int, factor: int
) -> None:
    few, many = (Plan(on_gpus(shape, n)).totals() for n in (workers, workers * factor))
    for name in SHARED:
        # Both: the busiest worker of many may compute more, if it has to move much less.
        work = [
            sum(total[name]["limits"].get(limit, 0.0) for limit in ("compute", "bandwidth"))
            for total in (few, many)
        ]
        # Rows are cut in whole tiles: an uneven cut may cost a few of them.
        assert work[1] <= 1.02 * work[0] + 1e-6, name


@settings(max_examples=30, deadline=None)
@given(
    nsamples=st.integers(1, 64),
    batch_size=st.integers(1, 8),
    workers=st.integers(1, 16),
    method=st.sampled_from(["magnitude", "wanda", "sparsegpt", "prox_admm"]),
)
def test_more_work_takes_no_less(
    shape: ModelShape, nsamples: int, batch_size: int, workers: int, method: str
) -> None:
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "method": method}
    plan = Plan(job_of(shape, nsamples=nsamples, **options))
    more = Plan(job_of(shape, nsamples=2 * nsamples, **options))
    assert more.seconds >= plan.seconds > 0
    assert sum(more.disk_bytes.values()) >= sum(plan.disk_bytes.values())
    larger = Plan(job_of(shape, nsamples=nsamples, **(options | {"batch_size": 2 * batch_size})))
    peaks = [max(p.host_bytes(phase) for _, _, phase in p.phases()) for p in (plan, larger)]
    assert peaks[1] >= peaks[0]


@settings(max_examples=30, deadline=None)
@given(factor=st.floats(1.1, 10.0))
def test_rates_are_in_seconds(shape: ModelShape, factor: float) -> None:
    """A machine whose every rate is `factor` times as high takes that much less time."""
    rates = gpu_rates("A100-80GB")
    waits = {"operator", "sync", "dispatch", "start"}
    fixed = {"host_bytes", "device_bytes", "device_memory"}
    changed = {
        f.name: getattr(rates, f.name) * (1 / factor if f.name in waits else factor)
        for f in fields(Rates)
        if f.type == "float" and f.name not in fixed
    }
    slow = Plan(replace(on_gpus(shape, 8), rates=rates))
    fast = Plan(replace(on_gpus(shape, 8), rates=replace(rates, **changed)))
    assert slow.seconds == pytest.approx(factor * fast.seconds)


def test_wanda_holds_no_square_matrix(shape: ModelShape) -> None:
    square = 4 * 8192**2
    full, diagonal = (
        max(phase.peak.device for _, _, phase in Plan(on_gpus(shape, 8, method=m)).phases())
        for m in ("prox_admm", "wanda")
    )
    assert full - diagonal > square
    solve = Plan(on_gpus(shape, 64, method="wanda")).blocks[0].phases[-1]
    assert solve.name == "solve"
    assert solve.peak.device < square


def test_one_worker_sends_nothing(shape: ModelShape) -> None:
    assert Plan(on_gpus(shape, 1)).network_bytes == 0
    two, four = (Plan(on_gpus(shape, n)).network_bytes for n in (2, 4))
    assert four == pytest.approx(3 * two)


# -- what does not fit ---------------------------------------------------------------------------


def test_what_does_not_fit_is_told_with_what_would(shape: ModelShape) -> None:
    most = next(n.needs for n in Plan(on_gpus(shape, 8)).needs() if n.what == "device memory")
    job = replace(on_gpus(shape, 8), device_memory=0.8 * most, disk=1e9)
    plan = Plan(job)
    problems = {need.what: options for need, options in plan.problems()}
    assert set(problems) == {"device memory", "disk"}
    assert problems["device memory"]
    for option in problems["device memory"]:
        name, value = option.split()
        changed = {
            "--batch-size": lambda: replace(job, batch_size=int(value)),  # noqa: B023
            "--gpus": lambda: with_workers(job, int(value)),  # noqa: B023
            "--seqlen": lambda: None,
            "--method": lambda: replace(job, settings=on_gpus(shape, 8, method=value).settings),  # noqa: B023
        }[name]()
        if changed is not None:
            need = next(n for n in Plan(changed).needs() if n.what == "device memory")
            assert need.fits, option
    # No number of sequences makes the weights smaller.
    assert problems["disk"] == ()
    text = plan_text(plan)
    assert "DOES NOT FIT" in text
    assert "what would fit" in text


def test_host_memory_counts_all_workers_of_a_node(shape: ModelShape) -> None:
    job = job_of(shape, workers=4, nodes=2)
    one, two = (
        next(n for n in Plan(j).needs() if n.what == "host memory").needs
        for j in (with_workers(replace(job, nodes=4), 4), job)
    )
    peak = max(Plan(job).host_bytes(phase) for _, _, phase in Plan(job).phases())
    assert two - one == pytest.approx(peak)


# -- JSON, tables, the command -------------------------------------------------------------------

NUMBER = (int, float)
SCHEMA: dict[str, Any] = {
    "schema_version": int,
    "model": {"name": str, "parameters": int, "weight_bytes": int, "blocks": int},
    "job": {"settings": dict, "nsamples": int, "seqlen": int, "batch_size": int},
    "machine": {"workers": int, "nodes": int, "rates": dict},
    "seconds": float,
    "phases": dict,
    "blocks": [{"first": int, "last": int, "seconds": float, "phases": list}],
    "once": [{"name": str, "seconds": float, "limit": str, "parts": list}],
    "disk_bytes": {"activations": NUMBER, "checkpoints": NUMBER, "output": NUMBER},
    "network_bytes": NUMBER,
    "needs": [{"what": str, "where": str, "needs": NUMBER, "fits": bool}],
    "problems": list,
    "scaling": [{"workers": int, "seconds": float}],
}


def conforms(value: Any, schema: Any, where: str = "") -> None:
    """Every key of the schema is there, with a value of its type."""
    if isinstance(schema, dict):
        for key, own in schema.items():
            conforms(value[key], own, f"{where}.{key}")
    elif isinstance(schema, list):
        assert value, where
        for item in value:
            conforms(item, schema[0], where)
    else:
        assert isinstance(value, schema), where


def test_the_json_has_its_schema(shape: ModelShape) -> None:
    payload = json.loads(json.dumps(plan_to_json(Plan(on_gpus(shape, 8)))))
    conforms(payload, SCHEMA)
    assert [entry["workers"] for entry in payload["scaling"]] == [1, 2, 4, 8, 16]


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(config_only(tmp_path))
    assert run(["plan", path, "--gpus", "8", "--seqlen", "64"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text  # nothing is cut off
    for word in ("check weights", "advance", "reduce", "limited by", "efficiency"):
        assert word in text
    assert run(["plan", path, "--workers", "2", "--seqlen", "64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["workers"] == 2
    assert run(["plan", path, "--gpus", "8", "--gpu-memory", "1MB", "--seqlen", "64"]) == 3
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert run(["plan", str(tmp_path / "absent.json"), "--gpus", "8"]) == 2
    assert run(["plan", path, "--gpus", "8", "--gpu", "TPU"]) == 2
    assert "H100" in capsys.readouterr().err


def test_rates_are_saved_and_read(tmp_path: Path) -> None:
    rates = cpu_rates()
    save_rates(rates, tmp_path / "rates.json")
    assert load_rates(tmp_path / "rates.json") == rates
    payload = json.loads((tmp_path / "rates.json").read_text())
    for broken in ({"float32": -1.0}, {"float32": "fast"}, {"speed": 1.0}, {"schema_version": 9}):
        (tmp_path / "broken.json").write_text(json.dumps(payload | broken))
        with pytest.raises(ConfigError):
            load_rates(tmp_path / "broken.json")


def test_every_known_gpu_has_rates() -> None:
    for name in GPUS:
        rates = gpu_rates(name)
        assert rates.on_gpu
        assert rates.bfloat16 > rates.statistics > rates.inverse / 2
    assert gpu_rates("h100").name == "H100"


@given(st.floats(0.001, 999.0), st.sampled_from(["", "k", "M", "G", "T"]), st.booleans())
def test_sizes(number: float, prefix: str, binary: bool) -> None:
    base = 1024.0 if binary else 1000.0
    text = f"{number:.6f} {prefix}{'i' if binary and prefix else ''}B"
    exponent = " kMGT".index(prefix or " ")
    expected = float(f"{number:.6f}") * (base if prefix else 1.0) ** exponent
    assert size_of(text, "disk") == pytest.approx(expected)


def test_sizes_for_people() -> None:
    assert [size_text(v) for v in (0, 999, 1234, 80e9, 12.34e12)] == [
        "0 B", "999 B", "1.23 kB", "80.0 GB", "12.3 TB"
    ]  # fmt: skip
    for text in ("80 gallons", "", "-1GB"):
        with pytest.raises(ConfigError):
            size_of(text, "disk")


def test_options_that_contradict_one_another(shape: ModelShape) -> None:
    for options in ({"gpus": 8, "workers": 2}, {"calibrate": True}, {"seqlen": 1}, {"gpus": 0}):
        with pytest.raises(ConfigError):
            PlanConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        planned_job(shape, PlanConfig(gpus=2, nodes=4))


def test_memory_within_a_container(tmp_path: Path) -> None:
    free = available_memory(tmp_path / "none")
    assert free > 0
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    assert available_memory(tmp_path) == 500000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == pytest.approx(free, rel=0.2)
