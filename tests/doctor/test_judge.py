"""What `prox24 doctor` makes of what it found: pure decisions, no cluster and no GPU."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.dispatch import node_doctors
from cluster.dispatch.node_doctors import node_names, reason_of
from pipeline.doctor.environment import HIDDEN, shown_environment
from pipeline.doctor.facts import Answer, Clock, Finding, NodeFacts, SumAnswer, Sums
from pipeline.doctor.judge import clocks, exit_status, folders, judge, merged, space, versions
from pipeline.doctor.judge_gpu import driver, gpus, triton
from pipeline.doctor.judge_sums import total
from pipeline.doctor.run_probe import run_probe

H100 = {"name": "NVIDIA H100", "capability": "9.0", "free": 80e9, "total": 85e9}
SPACE = {
    "memory": 64e9, "temporary": ["/tmp", 50e9], "shared_memory": 32e9, "open_files": 65536,
    "cores": 8,
}  # fmt: skip


def build(devices: int = 0, cuda: str | None = "13.0", error: str | None = None) -> Answer:
    """What the probe says of torch."""
    return Answer(
        {
            "version": "2.13.0",
            "cuda": cuda,
            "hip": None,
            "devices": [H100] * devices,
            "error": error,
        }
    )


def smi(version: str | None = "580.65", cuda: str | None = "13.0", gpus: int = 0) -> Answer:
    """What the probe says of the driver."""
    return Answer({"version": version, "cuda": cuda, "gpus": gpus, "error": None})


def node(name: str = "a", gpus: int | None = None, **answers: Answer) -> NodeFacts:
    known = {
        "versions": Answer({"versions": {"python": "3.12.1", "torch": "2.13.0"}}),
        "torch": build(cuda=None),
        "driver": smi(None, None),
        "space": Answer(SPACE),
    }
    return NodeFacts(name=name, gpus=gpus, answers=known | answers)


def test_all_is_well() -> None:
    nodes = [
        node(name, 8, torch=build(8), driver=smi(gpus=8), kernel=Answer({"error": None}))
        for name in "ab"
    ]
    ranks = tuple(SumAnswer(node=n, answer=Answer({"error": None})) for n in "aabb")
    found = judge(nodes, None, Sums(backend="nccl", ranks=ranks))
    assert {f.state for f in found} == {"ok", "skipped"}
    assert exit_status(found) == 0
    (seen,) = [f for f in found if f.check == "GPUs"]
    assert seen.where == ("a", "b")
    assert "8 x NVIDIA H100 (9.0)" in seen.found
    assert "nccl: 4 workers on 2 nodes" in next(f.found for f in found if f.check == "sum")


@pytest.mark.parametrize(
    ("facts", "parts"),
    [
        # A driver older than the wheel, as a job would run into it: on the CPU.
        (
            node(gpus=8, torch=build(error="driver is too old"), driver=smi("535.1", "12.2", 8)),
            ("Ray has 8 GPUs, torch sees 0", "built for CUDA 13.0", "driver 535.1", "too old",
             "CUDA up to 12.2", "update the driver"),
        ),
        (
            node(gpus=1, torch=build(), driver=smi(None, None)),
            ("no NVIDIA driver", "--gpus all", "--num-gpus 0"),
        ),
        (node(gpus=4, torch=build(cuda=None), driver=smi(gpus=4)), ("built without CUDA",)),
        (node(gpus=8, torch=build(7), driver=smi(gpus=7)), ("torch sees 7", "--num-gpus 7")),
        (node(torch=build(), driver=smi(gpus=1)), ("the system has 1 GPU, torch sees 0",)),
        (
            node(gpus=2, torch=Answer(problem="no answer in 60 s", hung=True)),
            ("cannot be imported: no answer in 60 s", "Ray has 2 GPUs", "--timeout"),
        ),
        (
            node(torch=Answer(problem="ModuleNotFoundError: No module named 'torch'")),
            ("No module named", "pip install -c constraints.txt"),
        ),
    ],
)  # fmt: skip
def test_gpus_that_are_not_seen(facts: NodeFacts, parts: tuple[str, ...]) -> None:
    found = gpus(facts)
    assert found.state == "wrong"
    for part in parts:
        assert part in f"{found.found} {found.remedy}", part


def test_gpus_that_nobody_uses() -> None:
    found = gpus(node(gpus=0, torch=build(2), driver=smi(gpus=2)))
    assert (found.state, "--num-gpus 2" in found.remedy) == ("warning", True)
    hidden = node(torch=build(), driver=smi(gpus=2))
    hidden = NodeFacts(name="a", answers=hidden.answers, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert gpus(hidden).state == "ok"  # hidden on purpose


def test_a_driver_that_fails() -> None:
    error = "nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch"
    found = driver(node(driver=Answer({"version": "1", "error": error})))
    assert (found.state, "was updated" in found.remedy) == ("wrong", True)
    assert driver(node(driver=Answer(problem="no answer in 60 s", hung=True))).state == "wrong"
    assert driver(node()).state == "ok"


def test_tritons_trial_launch() -> None:
    error = "Triton cannot run a kernel on cuda:0 (Failed to find C compiler.); install gcc"
    found = triton(node(gpus=1, torch=build(1), kernel=Answer({"error": error})))
    assert (found.state, found.remedy) == ("wrong", "install gcc")
    assert found.found.endswith("(Failed to find C compiler.)")
    error = "Triton is not installed, and a solve on a CUDA device needs it: install it; or else"
    found = triton(node(gpus=1, torch=build(1), kernel=Answer({"error": error})))
    assert found.remedy == "install it; or else"
    assert triton(node(torch=build(1), kernel=Answer(problem="killed by SIGSEGV"))).state == "wrong"
    assert triton(node()).state == "skipped"


def test_versions_that_differ() -> None:
    other = node("b", versions=Answer({"versions": {"python": "3.11.7", "torch": "2.13.0"}}))
    same, differs = versions([node("a"), other, node("c")])
    assert (same.state, same.found) == ("ok", "torch 2.13.0")
    assert differs.state == "wrong"
    assert differs.found == "python differs: 3.12.1 on a, c; 3.11.7 on b"
    silent = node("b", versions=Answer(problem="no answer in 9 s", hung=True))
    assert [f.state for f in versions([node("a"), silent])] == ["ok", "wrong"]


@pytest.mark.parametrize(
    ("ahead", "within", "state"),
    [(0.4, 0.01, "ok"), (5.0, 0.01, "warning"), (-5.0, 4.5, "ok"), (-40.0, 0.1, "wrong")],
)
def test_clocks(ahead: float, within: float, state: str) -> None:
    """Only what is certain counts: a slow answer tells little of a clock."""
    facts = NodeFacts(name="b", clock=Clock(ahead=ahead, within=within))
    (found,) = clocks([facts])
    assert found.state == state
    if state != "ok":
        assert ("ahead of" in found.found) == (ahead > 0)
        assert found.where == ("b",)


def test_a_clock_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By asking the node: here one that is an hour ahead."""
    monkeypatch.setattr(node_doctors.ray, "get", lambda call, timeout: call())
    clock = SimpleNamespace(remote=lambda: lambda: time.time() + 3600)
    asked: Any = SimpleNamespace(actor=SimpleNamespace(clock=clock))
    fact = node_doctors._timed(asked, NodeFacts(name="b"))
    assert fact.clock is not None
    assert 3599 < fact.clock.ahead < 3601
    assert clocks([fact])[0].state == "wrong"


def test_folders() -> None:
    good, bad = Answer({"free": 5e12, "problem": None}), Answer(problem="no answer in 60 s")
    name = "folder /data"
    (found,) = folders([node("a", **{name: good}), node("b", **{name: good})])
    assert (found.state, found.found) == ("ok", "/data: 5.00 TB free")
    found = folders([node("a", **{name: good}), node("b", **{name: bad})])[0]
    assert (found.state, found.where) == ("wrong", ("b",))
    assert "/data: no answer in 60 s" in found.found
    (full,) = folders([node("a", **{name: Answer({"free": 1e6, "problem": None})})])
    assert full.state == "warning"
    assert folders([node("a")])[0].state == "skipped"


def test_space() -> None:
    small = Answer(SPACE | {"shared_memory": 64e6, "memory": 1e9})
    poor = node("b", torch=build(8), space=small)
    found = space([node("a"), poor])
    assert "on every node at least 1.00 GB of memory" in found[0].found
    warned = {f.found: f for f in found[1:]}
    assert set(warned) == {
        "1.00 GB of memory, less than 2.00 GB of memory",
        "64.0 MB of /dev/shm, less than 8.00 GB of /dev/shm",
    }
    assert all(f.state == "warning" and f.where == ("b",) for f in warned.values())
    assert exit_status(found) == 0


def sums(*answers: Answer, backend: str = "nccl", busy: int = 0) -> Sums:
    ranks = tuple(SumAnswer(node=n, answer=a) for n, a in zip("abcd", answers, strict=False))
    return Sums(backend=backend, ranks=ranks, busy=busy)


def test_the_rank_that_fails_by_itself_is_the_one_that_is_named() -> None:
    late = Answer({"error": "wait timed out after 30000ms", "phase": "all"})
    own = Answer({"error": "Unable to find address for: ib7", "phase": "alone"})
    (found,) = total(sums(late, own, Answer(problem="no answer in 60 s", hung=True)))
    assert (found.state, found.where) == ("wrong", ("b",))
    assert "alone" in found.found
    assert "--network-interface" in found.remedy
    blocked = total(sums(late, late))
    assert [f.where for f in blocked] == [("a",), ("b",)]
    assert "open the ports" in blocked[0].remedy


def test_gpus_in_use_are_left_out_of_the_sum() -> None:
    good = Answer({"error": None})
    assert [f.state for f in total(sums(good, busy=3))] == ["ok", "warning"]
    assert total(Sums(reason="all GPUs are in use"))[0].state == "skipped"


def test_a_node_that_does_not_answer() -> None:
    silent = NodeFacts(name="b", gpus=8, problem="Ray starts no process there")
    found = judge([node("a"), silent], None, sums(Answer({"error": None}), backend="gloo"))
    assert found[0].check == "node"
    assert (found[0].state, found[0].where) == ("wrong", ("b",))
    assert {f.check for f in found} >= {"GPUs", "versions", "space"}
    assert exit_status(found) == 3


def test_equal_findings_are_one_row() -> None:
    rows = [
        Finding(check=check, state="ok", found="x", where=(name,))
        for name in "abc"
        for check in ("GPUs", "driver")
    ]
    assert [(f.check, f.where) for f in merged(rows)] == [
        ("GPUs", ("a", "b", "c")), ("driver", ("a", "b", "c"))
    ]  # fmt: skip


def test_no_secret_is_shown() -> None:
    shown = shown_environment(
        {
            "NCCL_DEBUG": "INFO",
            "CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
            "PYTHONPATH": "/opt/a-folder-with-a-long-name-2/lib",
            "HOME": "/root",
            "AWS_SECRET_ACCESS_KEY": "x",
            "RAY_JOB_ID": "01000000",
            "RAY_AUTH_MODE": "token",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_TOKEN": "short",
            "HUGGINGFACE_HUB_TOKEN": "short",
            "RAY_REDIS_PASSWORD": "short",
            "RAY_AUTH_TOKEN_PATH": "/root/.ray/auth_token",
            "HF_ENDPOINT": "https://user:pass@host",
            "RAY_RUNTIME_SETTINGS": '{"env_vars": {"A": "b"}}',
            "NCCL_ODD": "ab12cd34ef56ab12cd34ef56",
        }
    )
    kept = {name for name, value in shown.items() if value != HIDDEN}
    assert kept == {
        "NCCL_DEBUG", "CUDA_VISIBLE_DEVICES", "PYTHONPATH", "RAY_AUTH_MODE",
        "TOKENIZERS_PARALLELISM",
    }  # fmt: skip
    assert {"HF_TOKEN", "NCCL_ODD", "HF_ENDPOINT", "RAY_REDIS_PASSWORD"} <= set(shown)
    assert not {"HOME", "AWS_SECRET_ACCESS_KEY", "RAY_JOB_ID"} & set(shown)


def test_names_of_nodes() -> None:
    def entry(id: str, address: str) -> dict[str, str]:
        return {"NodeID": id * 8, "NodeManagerHostname": "vm", "NodeManagerAddress": address}

    names = node_names([entry("a", "10.0.0.2"), entry("b", "10.0.0.1"), entry("c", "10.0.0.1")])
    assert list(names.values()) == [
        "vm (10.0.0.1, bbbbbb)", "vm (10.0.0.1, cccccc)", "vm (10.0.0.2)"
    ]  # fmt: skip


def test_why_a_node_starts_no_process() -> None:
    text = "It died\nTraceback:\nModuleNotFoundError: No module named 'psutil'\nSee the docs."
    assert reason_of(RuntimeError(text)) == "ModuleNotFoundError: No module named 'psutil'"
    assert reason_of(RuntimeError("The actor died.\nIts node is gone.")) == "Its node is gone."


def test_a_probe_has_a_limit() -> None:
    answer = run_probe("versions", {}, 0.001, {})
    assert (answer.value, answer.hung) == (None, True)


def test_a_probe_that_fails_leaves_its_last_line() -> None:
    answer = run_probe("versions", {"unknown": 1}, 60.0, {})
    assert "unexpected keyword argument 'unknown'" in (answer.problem or "")
