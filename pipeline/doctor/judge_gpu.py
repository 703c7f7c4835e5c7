"""What is wrong with a node's GPUs: what Ray, torch and the driver say of them, compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.doctor.facts import Answer, Finding, NodeFacts
from pipeline.runtime.units import size_text

_INSTALL = "install a build of torch for CUDA (https://pytorch.org/get-started)"
_NO_GPU = "or start Ray there with --num-gpus 0, so that no job asks for a GPU"


def gpus(node: NodeFacts) -> Finding:
    """The GPUs that torch sees, beside those that Ray has, or without Ray those of the system."""
    build, expected = node.value("torch"), expected_gpus(node)
    who = "Ray has" if node.gpus is not None else "the system has"
    if not build:
        answer = node.answers.get("torch", Answer(problem="it was not asked"))
        return _finding(
            node,
            "wrong",
            f"torch cannot be imported: {answer.problem}"
            + (f"; {who} {_count(expected)}" if expected else ""),
            _import_remedy(answer),
        )
    devices = build["devices"]
    about = f"torch {build['version']} ({_built_for(build)})"
    if len(devices) < expected:
        system = node.value("driver")
        version = system.get("version")
        says = f"; torch: {build['error']}" if build["error"] else ""
        text = (
            f"{who} {_count(expected)}, torch sees {len(devices)}: {about}, "
            f"{f'driver {version}' if version else 'no NVIDIA driver'}{says}"
        )
        return _finding(node, "wrong", text, _unseen_remedy(node, build, system))
    if not devices:
        return _finding(node, "ok", f"none; {about}")
    shown = f"{_shown(devices)}; {about}"
    if node.gpus == 0:
        text = f"Ray has no GPU here, but torch sees {_count(len(devices))}: {shown}"
        remedy = f"start Ray there with --num-gpus {len(devices)}: else jobs leave them idle"
        return _finding(node, "warning", text, remedy)
    return _finding(node, "ok", shown)


def driver(node: NodeFacts) -> Finding:
    """NVIDIA's driver."""
    answer = node.answers.get("driver", Answer(problem="it was not asked"))
    system = answer.value or {}
    text = f"nvidia-smi: {answer.problem}" if answer.problem else system.get("error")
    if text:
        remedy = "restart the node: its driver or a GPU does not answer; `dmesg` may say more (Xid)"
        if "mismatch" in text.lower():
            remedy = "restart the node: the driver was updated while the old one is loaded"
        return _finding(node, "wrong", text, remedy, check="driver")
    if not system.get("version"):
        return _finding(node, "ok", "no NVIDIA driver", check="driver")
    cuda = f", runs CUDA up to {system['cuda']}" if system.get("cuda") else ""
    return _finding(node, "ok", f"{system['version']}{cuda}", check="driver")


def triton(node: NodeFacts) -> Finding:
    """Triton's trial launch."""
    if not node.value("torch").get("devices"):
        state = "torch sees no GPU" if expected_gpus(node) else "no GPU, so no kernel"
        return _finding(node, "skipped", state, check="triton")
    answer = node.answers.get("kernel", Answer(problem="it was not asked"))
    error = (answer.value or {}).get("error")
    if error:
        text, remedy = _parted(str(error))
        return _finding(node, "wrong", text, remedy, check="triton")
    if answer.problem:
        remedy = "look at the GPU (`nvidia-smi`, `dmesg`) and at Triton's cache (TRITON_CACHE_DIR)"
        return _finding(node, "wrong", f"trial launch: {answer.problem}", remedy, check="triton")
    return _finding(node, "ok", "a kernel is compiled and runs", check="triton")


def expected_gpus(node: NodeFacts) -> int:
    """GPUs that a job expects on the node: Ray's, or without Ray those of the system."""
    if node.gpus is not None:
        return node.gpus
    hidden = node.environment.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return 0  # someone has chosen which to see
    return int(node.value("driver").get("gpus", 0))


def _unseen_remedy(node: NodeFacts, build: Mapping[str, Any], system: Mapping[str, Any]) -> str:
    """Why torch sees fewer GPUs than there are, by what it was built for and what the driver is."""
    if build["cuda"] is None:
        return f"{_INSTALL}; {_NO_GPU}" if node.gpus is not None else _INSTALL
    if not system.get("version"):
        return (
            "install NVIDIA's driver, or start the container with its GPUs (`--gpus all`, or "
            f"nvidia.com/gpu in Kubernetes); {_NO_GPU}"
        )
    if system.get("cuda") and _number(build["cuda"])[0] > _number(system["cuda"])[0]:
        return (
            f"the driver runs CUDA up to {system['cuda']}, torch was built for {build['cuda']}: "
            "update the driver, or install a build of torch for the older CUDA "
            "(https://pytorch.org/get-started)"
        )
    if "CUDA_VISIBLE_DEVICES" in node.environment:
        return "CUDA_VISIBLE_DEVICES hides GPUs: start Ray without it, or with fewer --num-gpus"
    return (
        "look at `nvidia-smi` on that node: a GPU may be lost or in use by a MIG layout; or start "
        f"Ray there with --num-gpus {len(build['devices'])}"
    )


def _parted(error: str) -> tuple[str, str]:
    """What is wrong, and the remedy, of an error of `trial_launch`: `what (why); remedy`, or
    `what: remedy`."""
    text, mark, remedy = error.partition("); ")
    if mark:
        return f"{text})", remedy
    text, _, remedy = error.partition(": ")
    return text, remedy


def _import_remedy(answer: Answer) -> str:
    if answer.hung:
        return (
            "look at the disk that its Python environment is on, and at the GPU (`nvidia-smi`, "
            "`dmesg`); a first import from a slow disk may need a larger --timeout"
        )
    if "No module named" in (answer.problem or ""):
        return "install prox24's dependencies on that node (pip install -c constraints.txt .)"
    return "install torch again there (`pip install --force-reinstall torch`), for CUDA or for CPUs"


def _shown(devices: list[Mapping[str, Any]]) -> str:
    """`8 x NVIDIA H100, 81.6 GB each, 80.0 GB free at least`."""
    kinds: dict[str, int] = {}
    for device in devices:
        name = f"{device['name']} ({device['capability']}), {size_text(device['total'])}"
        kinds[name] = kinds.get(name, 0) + 1
    shown = ", ".join(f"{count} x {name}" for name, count in kinds.items())
    return f"{shown}, at least {size_text(min(device['free'] for device in devices))} free"


def _built_for(build: Mapping[str, Any]) -> str:
    if build["cuda"]:
        return f"built for CUDA {build['cuda']}"
    return f"built for ROCm {build['hip']}" if build["hip"] else "built without CUDA"


def _count(number: int) -> str:
    return "no GPU" if not number else f"{number} GPU{'s' if number > 1 else ''}"


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _finding(
    node: NodeFacts, state: Any, found: str, remedy: str = "", *, check: str = "GPUs"
) -> Finding:
    return Finding(check=check, state=state, found=found, where=(node.name,), remedy=remedy)
