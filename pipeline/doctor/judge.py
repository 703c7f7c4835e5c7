"""What is right and what is wrong with the nodes, by what was found: pure decisions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.doctor.facts import Finding, NodeFacts, State, Sums
from pipeline.doctor.judge_gpu import driver, gpus, triton
from pipeline.doctor.judge_sums import total
from pipeline.runtime.units import size_text

# Locks and `prox24 status` compare the clocks of nodes; an owner counts as silent after 30 s.
_CLOCK_WARNING = 1.0
_CLOCK_WRONG = 30.0
_LEAST_MEMORY = 2e9
_LEAST_DISK = 1e9
# What NCCL takes of /dev/shm for each GPU of a node.
_SHM_OF_A_GPU = 1e9
_LEAST_FILES = 4096


def judge(nodes: Sequence[NodeFacts], driver_facts: NodeFacts | None, sums: Sums) -> list[Finding]:
    """All findings, in the order of the table.

    driver_facts: of the process that asked, where it is none of the nodes: its versions count, and
    its folders. sums: the sum over all workers.
    """
    answering = [node for node in nodes if node.problem is None]
    everyone = [*answering, *([driver_facts] if driver_facts is not None else [])]
    found = [_silent(node) for node in nodes if node.problem is not None]
    found += versions(everyone)
    found += merged(check(node) for node in answering for check in (gpus, driver, triton))
    found += total(sums)
    found += folders(everyone)
    found += space(answering)
    found += clocks(answering)
    found += environment(answering)
    return found


def exit_status(findings: Iterable[Finding]) -> int:
    """0, or 3 where something is wrong. A warning alone changes nothing."""
    return 3 if any(finding.state == "wrong" for finding in findings) else 0


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that are equal but for their node become one, in the order of the checks."""
    nodes: dict[Finding, tuple[str, ...]] = {}
    for each in findings:
        bare = Finding(check=each.check, state=each.state, found=each.found, remedy=each.remedy)
        nodes[bare] = (*nodes.get(bare, ()), *each.where)
    order = list(dict.fromkeys(bare.check for bare in nodes))
    return [
        Finding(
            check=bare.check, state=bare.state, found=bare.found, remedy=bare.remedy, where=where
        )
        for bare, where in sorted(nodes.items(), key=lambda item: order.index(item[0].check))
    ]


def _silent(node: NodeFacts) -> Finding:
    return Finding(
        check="node",
        state="wrong",
        found=node.problem or "",
        where=(node.name,),
        remedy="look at its logs (/tmp/ray/session_latest/logs), at its memory and its disk; stop "
        "Ray there if it stays so",
    )


def versions(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Versions, which must be the same everywhere: one finding, or one for each that differs."""
    known: dict[str, dict[str, list[str]]] = {}
    found = []
    for node in nodes:
        for name, version in node.value("versions").get("versions", {}).items():
            known.setdefault(name, {}).setdefault(version, []).append(node.name)
        if problem := node.answers["versions"].problem:
            found.append(
                Finding(
                    check="versions",
                    state="wrong",
                    found=f"Python does not answer: {problem}",
                    where=(node.name,),
                    remedy="look at the disk that its Python environment is on",
                )
            )
    same = {name: next(iter(by)) for name, by in known.items() if len(by) == 1}
    if same:
        shown = ", ".join(f"{name} {version}" for name, version in same.items())
        found.insert(0, Finding(check="versions", state="ok", found=shown))
    for name, by in known.items():
        if len(by) > 1:
            parts = (f"{version} on {', '.join(where)}" for version, where in by.items())
            remedy = "install the same version on all nodes (pip install -c constraints.txt)"
            if name == "prox24":
                remedy = "run the same checkout everywhere: the driver sends its code with the job"
            text = f"{name} differs: {'; '.join(parts)}"
            found.append(Finding(check="versions", state="wrong", found=text, remedy=remedy))
    return found


def folders(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Folders that must be shared; how much is free there."""
    names = list(dict.fromkeys(n for node in nodes for n in node.answers if n.startswith("folder")))
    if not names:
        text = "not checked: name them with --folder"
        return [Finding(check="folders", state="skipped", found=text)]
    found = []
    for name in names:
        path, free = name.partition(" ")[2], []
        for node in nodes:
            answer = node.answers.get(name)
            if answer is None:
                continue
            problem = answer.problem or (answer.value or {}).get("problem")
            if problem:
                found.append(_folder_problem(node, path, problem))
            else:
                free.append(node.value(name)["free"])
        if free:
            text = f"{path}: {size_text(min(free))} free"
            if min(free) < _LEAST_DISK:
                remedy = "make room, or use another folder"
                found.append(Finding(check="folders", state="warning", found=text, remedy=remedy))
            elif len(free) == sum(name in node.answers for node in nodes):
                found.append(Finding(check="folders", state="ok", found=text))
    return merged(found)


def _folder_problem(node: NodeFacts, path: str, problem: str) -> Finding:
    problem = problem.replace(f"the folder, {path}", "it")
    return Finding(
        check="folders",
        state="wrong",
        found=f"{path}: {problem}",
        where=(node.name,),
        remedy="mount the same filesystem there under the same path, with write access; MODEL, "
        "OUTPUT and the run directory must be on such folders",
    )


def space(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Memory, temporary disk, /dev/shm and open files: the least of all, and who has too little."""
    found, least = [], dict[str, tuple[float, str]]()
    for node in nodes:
        facts = node.value("space")
        if not facts:
            problem = node.answers["space"].problem
            text, remedy = f"no answer: {problem}", "look at that node's disks"
            found.append(_wrong("space", text, node, remedy))
            continue
        for what, have, need, remedy in _amounts(node, facts):
            least[what] = min(least.get(what, (have, "")), (have, node.name))
            if have < need:
                text = f"{_amount(what, have)}, less than {_amount(what, need)}"
                found.append(_wrong("space", text, node, remedy, state="warning"))
    if least:
        parts = ", ".join(_amount(what, have) for what, (have, _) in least.items())
        of = "on every node at least " if len(nodes) > 1 else ""
        found.insert(0, Finding(check="space", state="ok", found=of + parts))
    return merged(found)


_FILES = "open files"


def _amount(what: str, value: float) -> str:
    return f"{value:.0f} {what}" if what == _FILES else f"{size_text(value)} of {what}"


def _amounts(node: NodeFacts, facts: Mapping[str, Any]) -> Iterable[tuple[str, float, float, str]]:
    """What, how much there is, how much there should be, and the remedy."""
    yield (
        "memory",
        facts["memory"],
        _LEAST_MEMORY,
        "end other programs, or leave the node out; `prox24 plan` says what a job needs",
    )
    folder, free = facts["temporary"]
    yield (
        folder,
        free,
        _LEAST_DISK,
        "make room: Ray writes its logs there; or start Ray with --temp-dir",
    )
    if facts["shared_memory"] is not None:
        gpus = len(node.value("torch").get("devices", ()))
        yield (
            "/dev/shm",
            facts["shared_memory"],
            _SHM_OF_A_GPU * gpus if gpus > 1 else 0.0,
            "give the container more: `docker run --shm-size`, or a memory volume in Kubernetes",
        )
    yield (
        _FILES,
        facts["open_files"],
        _LEAST_FILES,
        "raise it before Ray is started: `ulimit -n 65536`",
    )


def clocks(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Clocks beside the driver's."""
    found, known = [], [node for node in nodes if node.clock is not None]
    worst = 0.0
    for node in known:
        assert node.clock is not None
        difference = node.clock.certain
        worst = max(worst, difference)
        if difference > _CLOCK_WARNING:
            side = "ahead of" if node.clock.ahead > 0 else "behind"
            text = f"{abs(node.clock.ahead):.1f} s {side} the driver's clock"
            state: State = "wrong" if difference > _CLOCK_WRONG else "warning"
            remedy = (
                "set the clock (chrony or systemd-timesyncd): heartbeats of locks, `prox24 "
                "status` and logs go by it"
            )
            found.append(_wrong("clocks", text, node, remedy, state=state))
    if known and not found:
        text = f"all within {max(worst, 0.01):.2f} s of the driver's"
        found = [Finding(check="clocks", state="ok", found=text)]
    return found


def environment(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Variables that change behaviour: for information, on the nodes that have them alike."""
    return merged(
        Finding(
            check="environment",
            state="ok",
            found=", ".join(f"{n}={v}" for n, v in node.environment.items()) or "nothing set",
            where=(node.name,),
        )
        for node in nodes
    )


def _wrong(
    check: str, text: str, node: NodeFacts, remedy: str, *, state: State = "wrong"
) -> Finding:
    return Finding(check=check, state=state, found=text, where=(node.name,), remedy=remedy)
