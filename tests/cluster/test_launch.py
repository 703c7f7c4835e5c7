"""The launch files: valid by the schemas of who reads them, and run as far as one machine goes."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.command_line import parse

KUBERNETES = "1.34"
# The fields of KubeRay 1.6's RayJob and RayCluster that the manifest uses, and their types. The
# pods inside are checked against Kubernetes' own schemas.
RAY_JOB = {
    "entrypoint": str, "backoffLimit": int, "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int, "submissionMode": str, "rayClusterSpec": dict,
}  # fmt: skip
RAY_CLUSTER = {
    "rayVersion": str, "authOptions": dict, "workerGroupSpecs": list, "headGroupSpec": dict,
}  # fmt: skip
WORKER_GROUP = {
    "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int,
    "rayStartParams": dict, "template": dict,
}  # fmt: skip
HEAD_GROUP = {"rayStartParams": dict, "template": dict}


@pytest.fixture(scope="module")
def launch(repository: Path) -> Path:
    return repository / "cluster" / "launch"


@pytest.fixture(scope="module")
def documents(launch: Path) -> dict[str, dict[str, Any]]:
    """The manifest's documents by kind."""
    loaded = yaml.safe_load_all((launch / "kuberay.yaml").read_text())
    return {document["kind"]: document for document in loaded}


def fits(value: dict[str, Any], fields: dict[str, type]) -> None:
    assert set(value) <= set(fields)
    for name, entry in value.items():
        assert isinstance(entry, fields[name]), name


def validate(document: dict[str, Any]) -> None:
    """Against the schema that Kubernetes publishes for its kind; unknown fields are errors."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def templates(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def test_the_rayjob_has_the_fields_of_kuberay(documents: dict[str, dict[str, Any]]) -> None:
    job = documents["RayJob"]
    assert job["apiVersion"] == "ray.io/v1"
    assert all(isinstance(value, str) for value in job["metadata"]["annotations"].values())
    fits(job["spec"], RAY_JOB)
    cluster = job["spec"]["rayClusterSpec"]
    fits(cluster, RAY_CLUSTER)
    fits(cluster["headGroupSpec"], HEAD_GROUP)
    for group in cluster["workerGroupSpecs"]:
        fits(group, WORKER_GROUP)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        # KubeRay makes `ray start` options of them: strings only.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_its_pods_are_valid_for_kubernetes(documents: dict[str, dict[str, Any]]) -> None:
    for template in templates(documents["RayJob"]["spec"]["rayClusterSpec"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template["metadata"]}}
        validate({**pod, "spec": template["spec"]})
    validate(documents["NetworkPolicy"])
    validate(documents["PersistentVolumeClaim"])


def test_a_wrong_field_is_found(documents: dict[str, dict[str, Any]]) -> None:
    claim = documents["PersistentVolumeClaim"]
    with pytest.raises(Exception, match="accessMode"):
        validate({**claim, "spec": {**claim["spec"], "accessMode": "ReadWriteMany"}})


def test_the_rayjob_does_what_it_says(documents: dict[str, dict[str, Any]]) -> None:
    """Token on, restarts that resume, a volume that all pods share, room in /dev/shm."""
    spec = documents["RayJob"]["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["rayVersion"] == importlib.metadata.version("ray")
    assert spec["backoffLimit"] > 0
    claim = documents["PersistentVolumeClaim"]["metadata"]["name"]
    own = documents["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    for template in templates(cluster):
        assert own.items() <= template["metadata"]["labels"].items()
        assert template["spec"]["restartPolicy"] == "Never"  # KubeRay makes a new pod
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim
        (container,) = template["spec"]["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert volumes[mounts["/shared"]]["name"] == "shared"
    command = shlex.split(spec["entrypoint"])
    assert command[:3] == ["python", "-m", "cluster"]
    options = parse(command[3:])
    assert options.model.startswith("/shared/")
    assert options.output.startswith("/shared/")
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert options.workers == group["replicas"] * gpus


@pytest.mark.parametrize("script", ["hosts.sh", "slurm.sh"])
def test_the_scripts_are_sound(launch: Path, script: str) -> None:
    path = launch / script
    assert path.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck")
    done = subprocess.run([shellcheck, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_is_made_of_what_there_is(repository: Path, launch: Path) -> None:
    lines = (launch / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert {"storage", "pipeline", "actors", "cluster", "constraints.txt"} <= set(copied)
    assert all((repository / name).exists() for name in copied)
    (torch,) = [line.split("=", 1)[1] for line in lines if line.startswith("ARG TORCH")]
    assert torch in (repository / "constraints.txt").read_text().splitlines()
    extras = re.findall(r"\.\[(\w+)\]", "\n".join(lines))
    project = (repository / "pyproject.toml").read_text()
    assert extras
    assert all(re.search(rf"^{extra} = ", project, re.MULTILINE) for extra in extras)


@pytest.fixture
def tools(tmp_path: Path) -> Callable[[str, str], Path]:
    """A folder of commands that stand in for SLURM's and Ray's: `tools(name, script)`."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name: str, script: str) -> Path:
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
        return folder

    return make


def run_script(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    keep = {key: os.environ[key] for key in ("PATH", "HOME", "USER") if key in os.environ}
    return subprocess.run(
        [script, *arguments],
        env=keep | {"USER": "someone"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def slurm(launch: Path, tmp_path: Path, tools: Callable[[str, str], Path], ray: str) -> Any:
    """Runs the script with SLURM's commands played: the nodes are this host; `ray` is given."""
    tools("scontrol", '[ "$*" = "show hostnames a[1-2]" ] && printf "a1\\na2\\n"')
    tools("hostname", 'echo "10.1.2.3 10.9.9.9"')
    tools(
        "srun",
        'while [[ "$1" == --* ]]; do [[ "$1" == --nodelist=* ]] && echo "$1" >> '
        f'{tmp_path}/srun; shift; done\nexec "$@"',
    )
    folder = tools("ray", ray)
    environment = tmp_path / "venv" / "bin"
    environment.mkdir(parents=True)
    (environment / "activate").write_text(f"PATH={folder}:$PATH\n")
    return run_script(
        launch / "slurm.sh",
        ENVIRONMENT=str(environment.parent),
        MODEL="/m",
        OUTPUT=str(tmp_path / "output"),
        OPTIONS="--nsamples 4",
        SLURM_JOB_NODELIST="a[1-2]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_ID="123456",
    )


def test_the_slurm_script_starts_ray_on_all_nodes(
    launch: Path, tmp_path: Path, tools: Callable[[str, str], Path]
) -> None:
    ray = (
        f'printf "%s\\n" "$@" > {tmp_path}/arguments; env > {tmp_path}/environment; '
        f"mkdir {tmp_path}/output; touch {tmp_path}/output/prox24.json"
    )
    done = slurm(launch, tmp_path, tools, ray)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "srun").read_text() == "--nodelist=a1\n"
    arguments = (tmp_path / "arguments").read_text().split()
    split = arguments.index("--")
    assert arguments[:5] == ["symmetric-run", "--address", "10.1.2.3:23456", "--min-nodes", "2"]
    assert "--dashboard-host 127.0.0.1" in " ".join(arguments[:split])
    assert arguments[split + 1 : split + 4] == ["python", "-m", "cluster"]
    options = parse(arguments[split + 4 :])
    assert (options.model, options.nsamples) == ("/m", 4)
    assert options.ray_address == "10.1.2.3:23456"
    environment = dict(
        line.split("=", 1)
        for line in (tmp_path / "environment").read_text().splitlines()
        if "=" in line
    )
    assert environment["RAY_AUTH_MODE"] == "token"
    assert re.fullmatch("[0-9a-f]{64}", environment["RAY_AUTH_TOKEN"])
    assert environment["RAY_ADDRESS"] == "10.1.2.3:23456"
    assert len(environment["RAY_TMPDIR"]) < 40  # the sockets below it have at most 107 characters


@pytest.mark.parametrize(("ray", "status"), [("exit 3", 3), ("exit 0", 1)])
def test_the_slurm_script_fails_where_the_job_does(
    launch: Path, tmp_path: Path, tools: Callable[[str, str], Path], ray: str, status: int
) -> None:
    """Also where `ray symmetric-run` ends with 0 because Ray itself did not start."""
    done = slurm(launch, tmp_path, tools, ray)
    assert done.returncode == status
    assert ("is not there" in done.stderr) == (ray == "exit 0")


def test_hosts_without_a_token_are_not_started(
    launch: Path, tmp_path: Path, tools: Callable[[str, str], Path]
) -> None:
    log = tmp_path / "log"
    folder = tools("ray", f'[ "$1" = get-auth-token ] && exit ${{TOKEN:-1}}; echo "$@" > {log}')
    path = f"{folder}:{os.environ['PATH']}"
    for command in (["head"], ["join", "10.0.0.1"]):
        done = run_script(launch / "hosts.sh", *command, PATH=path, ADDRESS="10.0.0.1")
        assert done.returncode == 1
        assert "no token" in done.stderr
        assert not log.exists()
    done = run_script(launch / "hosts.sh", "head", PATH=path, ADDRESS="10.0.0.1", TOKEN="0")
    assert done.returncode == 0, done.stderr
    started = log.read_text()
    assert "start --head" in started
    assert "--dashboard-host 127.0.0.1" in started
    assert "--node-ip-address 10.0.0.1" in started
    done = run_script(launch / "hosts.sh", "help", PATH=path)
    assert done.returncode == 2
    assert "hosts.sh join" in done.stderr
