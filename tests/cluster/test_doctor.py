"""`prox24 doctor`: as a process on this machine, on a cluster of two nodes, and on three hosts.

What breaks a machine is put in its way for real: a torch that cannot import, an nvidia-smi that
hangs or lists GPUs, GPUs that Ray has and torch has not, a folder that is not shared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.command_line import run
from cluster.commands.doctor import doctor_text
from pipeline.doctor.facts import Finding
from tests.support.namespaces import HostedDriver, network
from tests.support.ray_jobs import STORE_BYTES, ray_cluster

TWO_GPUS = """#!/bin/sh
if [ "$1" = -L ]; then
    echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)"
    echo "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)"
else
    echo "| NVIDIA-SMI 470.57.02   Driver Version: 470.57.02   CUDA Version: 11.4 |"
fi
"""
HANGS = "#!/bin/sh\nexec sleep 1000\n"
SECRETS = {
    "HF_TOKEN": "hf_donotprintme",
    "RAY_AUTH_TOKEN": "donotprintme2",
    "NCCL_SOMETHING": "a1B2c3D4e5F6g7H8i9J0k1L2donotprintme",
}


def a_path(folder: Path, smi: str) -> str:
    """$PATH with an nvidia-smi of that text first."""
    folder.mkdir(parents=True)
    program = folder / "nvidia-smi"
    program.write_text(smi)
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def doctor(repository: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`prox24 doctor` in a process of its own."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS",)}
    return subprocess.run(
        [sys.executable, "-m", "cluster", "doctor", *arguments],
        cwd=repository, env=inherited | {"PYTHONPATH": str(repository)} | variables,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def by_check(answer: dict[str, Any], check: str, state: str | None = None) -> list[dict[str, Any]]:
    """The findings of a check, in a state."""
    return [f for f in answer["findings"] if f["check"] == check and state in (None, f["state"])]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
def test_this_machine(repository: Path, tmp_path: Path) -> None:
    """All is well without a GPU; no secret is printed; a plain file is no folder."""
    done = doctor(repository, "--json", f"--folder={tmp_path}", **SECRETS)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    states = {finding["check"]: finding["state"] for finding in answer["findings"]}
    assert states == {
        "versions": "ok", "GPUs": "ok", "driver": "ok", "triton": "skipped", "sum": "ok",
        "folders": "ok", "space": states["space"], "environment": "ok",
    }  # fmt: skip
    assert torch.__version__ in by_check(answer, "GPUs")[0]["found"]
    assert "gloo: 2 workers" in by_check(answer, "sum")[0]["found"]
    assert "donotprintme" not in done.stdout + done.stderr
    for name in SECRETS:
        assert f"{name}=(set, not shown)" in by_check(answer, "environment")[0]["found"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch sees its GPUs")
def test_gpus_that_torch_does_not_see(repository: Path, tmp_path: Path) -> None:
    done = doctor(repository, PATH=a_path(tmp_path / "bin", TWO_GPUS))
    assert done.returncode == 3, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert f"GPUs WRONG the system has 2 GPUs, torch sees 0: torch {torch.__version__}" in text
    assert "driver 470.57.02" in text
    assert "remedy: install a build of torch for CUDA" in text
    assert "1 node: 1 wrong, 0 warnings" in text


def test_a_broken_machine_still_gets_its_table(repository: Path, tmp_path: Path) -> None:
    """torch does not import, nvidia-smi hangs, and the folder is not there."""
    (tmp_path / "lib" / "torch").mkdir(parents=True)
    broken = 'raise ImportError("libcudart.so.12: cannot open shared object file")'
    (tmp_path / "lib" / "torch" / "__init__.py").write_text(broken)
    done = doctor(
        repository, "--timeout=4", "--folder", "/nowhere/x", "--folder", "/nowhere/y",
        PATH=a_path(tmp_path / "bin", HANGS), PYTHONPATH=f"{tmp_path / 'lib'}:{repository}",
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert "GPUs WRONG torch cannot be imported: ImportError: libcudart.so.12" in text
    assert "driver WRONG nvidia-smi: no answer in 4 s remedy: restart the node" in text
    assert "sum - not tried: torch does not answer" in text
    for name in ("x", "y"):
        assert f"folders WRONG /nowhere/{name}: no such folder" in text
    assert "versions ok python" in text


@contextmanager
def _two_nodes(tmp_path: Path) -> Iterator[str]:
    """The address of two nodes on this machine; the second has two GPUs, Ray says, and hangs."""
    with ray_cluster(1) as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", a_path(tmp_path / "bin", HANGS))
        patch.setenv("NCCL_DEBUG", "WARN")
        made.add_node(num_cpus=1, num_gpus=2, object_store_memory=STORE_BYTES)
        yield made.address


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch sees its GPUs")
@pytest.mark.slow
def test_gpus_that_ray_has_and_torch_has_not(repository: Path, tmp_path: Path) -> None:
    """Said of that node alone, with driver and torch build; what hangs there holds up nothing."""
    with _two_nodes(tmp_path) as address:
        (tmp_path / "shared").mkdir()
        done = doctor(
            repository, "--json", "--timeout=25", f"--ray-address={address}",
            f"--folder={tmp_path / 'shared'}",
        )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    names = [node["name"] for node in answer["nodes"]]
    assert len(set(names)) == 2
    (wrong,) = by_check(answer, "GPUs", "wrong")
    (node,) = wrong["where"]
    for part in ("Ray has 2 GPUs, torch sees 0", torch.__version__, "driver"):
        assert part in wrong["found"]
    assert by_check(answer, "driver", "wrong")[0]["where"] == [node]
    assert "nvidia-smi" in by_check(answer, "driver", "wrong")[0]["found"]
    assert {f["where"][0] for f in by_check(answer, "GPUs", "ok")} == set(names) - {node}
    assert by_check(answer, "sum")[0]["state"] == "ok"
    assert "gloo: 2 workers on 2 nodes" in by_check(answer, "sum")[0]["found"]
    for check in ("dashboard", "folders", "clocks", "versions"):
        assert [f["state"] for f in by_check(answer, check)] == ["ok"], check
    assert list((tmp_path / "shared").iterdir()) == []
    (nccl,) = [f for f in by_check(answer, "environment") if "NCCL_DEBUG=WARN" in f["found"]]
    assert nccl["where"] == [node]
    findings = [Finding(**{**f, "where": tuple(f["where"])}) for f in answer["findings"]]
    assert f"WRONG {node}:" in " ".join(doctor_text(findings, names).split())


def test_no_cluster_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--ray-address", "127.0.0.1:1"]) == 2
    assert "no Ray cluster answers at 127.0.0.1:1" in capsys.readouterr().err


def test_options_of_ray_without_ray(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--executor", "local", "--ray-address", "auto"]) == 2
    assert "--ray-address has no effect" in capsys.readouterr().err
    assert run(["doctor", "--timeout", "0"]) == 2
    assert "--timeout must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.cluster
def test_a_folder_that_a_host_does_not_share(repository: Path, tmp_path: Path) -> None:
    """On hosts of their own, the sum by the network between them, one with another disk there."""
    shared = tmp_path / "shared"
    shared.mkdir()
    with (
        tempfile.TemporaryDirectory(prefix="p24-", ignore_cleanup_errors=True) as folder,
        network(Path(folder), 2) as hosts,
    ):
        hosts.start_ray(hosts.hosts[0])
        blind = hosts.hosts[1]
        hosts.start_ray(blind, before=f"mount -t tmpfs none {shared}")
        arguments = ["-m", "cluster", "doctor", f"--ray-address={hosts.address}", "--json"]
        driver = HostedDriver(
            hosts, repository, [*arguments, f"--folder={shared}"], tmp_path / "log"
        )
        try:
            assert driver.wait() == 3, driver.messages()
        finally:
            driver.end()
            print(driver.messages())
        answer = json.loads(driver.messages().splitlines()[-1])
        (wrong,) = [f for f in answer["findings"] if f["state"] == "wrong"]
        assert wrong["found"] == f"{shared}: does not see what the driver writes to it"
        assert len(wrong["where"]) == 1
        assert blind.address in wrong["where"][0]
        (together,) = by_check(answer, "sum")
        assert "gloo: 2 workers on 2 nodes, and each alone" in together["found"]
