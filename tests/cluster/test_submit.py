"""`ray job submit` to a cluster on whose nodes nothing of prox24 is installed, and from a wheel.

The head, where the driver runs, has no CPU to give; the workers run on another host.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.jobs import contents, write_text
from tests.support.namespaces import RAY, HostedDriver, Network, network
from tests.support.ray_jobs import undisturbed
from tests.support.tiny_models import save_tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp_cors") is None,
        reason="job submission needs ray[default]: pip install prox24[cluster]",
    ),
]

Source = tuple[Path, Path, dict[str, bytes]]
JOBS = "http://127.0.0.1:8265"


def bare_python(folder: Path) -> Path:
    """An interpreter that has what this one has, but prox24."""
    venv.create(folder, with_pip=False)
    scheme = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", vars=scheme))
    # Folders on the path; `.pth` files in them, such as prox24's own, are not read.
    ours = [folder for folder in sys.path if Path(folder).name == "site-packages"]
    (packages / "ours.pth").write_text("\n".join(ours) + "\n")
    python = folder / "bin" / "python"
    done = subprocess.run([python, "-c", "import cluster"], cwd="/", capture_output=True)
    if done.returncode == 0:
        pytest.skip("prox24 is installed among its dependencies: install it with -e")
    return python


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("submit")
    model = save_tiny_model(folder / "model", blocks=3)
    text = write_text(folder / "text.txt")
    return model, text, undisturbed(model, text, folder / "whole")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare_python(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def hosts(python: Path) -> Iterator[Network]:
    with (
        tempfile.TemporaryDirectory(prefix="p24-", ignore_cleanup_errors=True) as folder,
        network(Path(folder), 2) as made,
    ):
        dashboard = ("--include-dashboard=true", "--dashboard-host=127.0.0.1")
        made.start_ray(made.hosts[0], "--num-cpus=0", *dashboard, python=python)
        made.start_ray(made.hosts[1], "--num-cpus=2", python=python)
        yield made


def job_options(source: Source) -> list[str]:
    return [
        f"--dataset={source[1]}", "--workers=2", "--nsamples=8", "--seqlen=32",
        "--batch-size=2", "--threads=1",
    ]  # fmt: skip


def test_from_a_checkout(
    hosts: Network, source: Source, python: Path, repository: Path, tmp_path: Path
) -> None:
    """The job's code reaches its driver and its workers, and its exit code is told."""
    submit = [*RAY, "job", "submit", f"--address={JOBS}", "--working-dir=.", "--"]
    prune = ["python", "-m", "cluster", "prune"]
    output = tmp_path / "output"
    arguments = [*submit, *prune, source[0], output, *job_options(source)]
    job = HostedDriver(hosts, repository, arguments, tmp_path / "log", python)
    missing = [*submit, *prune, tmp_path / "missing", tmp_path / "other"]
    refused = HostedDriver(hosts, repository, missing, tmp_path / "refused", python)
    try:
        assert job.wait() == 0, job.messages()
        # Ray's command ends with 1 whatever the job ended with, and tells which.
        assert refused.wait() == 1, refused.messages()
    finally:
        job.end()
        refused.end()
    assert contents(output) == source[2]
    assert "failed with exit code 2" in refused.messages()
    assert f"prox24: {tmp_path / 'missing'} is not a model folder" in refused.messages()


def test_with_the_wheel_on_the_drivers_node_alone(
    hosts: Network, source: Source, repository: Path, tmp_path: Path
) -> None:
    """The driver sends its own prox24 along: the workers' node has none."""
    installed = bare_python(tmp_path / "venv")
    packed = tmp_path / "checkout"
    for package in ("storage", "pipeline", "actors", "cluster"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(repository / package, packed / package, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, packed)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path}", packed]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = tmp_path.glob("prox24-*.whl")
    subprocess.run([*pip, "--python", installed, "install", "--no-deps", wheel], check=True)
    command = installed.parent / "prox24"
    output = tmp_path / "output"
    arguments = [
        *RAY, "job", "submit", f"--address={JOBS}", "--",
        command, "prune", source[0], output, *job_options(source),
    ]  # fmt: skip
    job = HostedDriver(hosts, tmp_path, arguments, tmp_path / "log", installed)
    try:
        assert job.wait() == 0, job.messages()
    finally:
        job.end()
    assert contents(output) == source[2]
