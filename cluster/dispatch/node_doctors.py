"""Asks every node of a Ray cluster what it has, for `prox24 doctor`. No node can hold it up."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.doctor import NodeDoctor
from cluster.dispatch.failures import reason_of
from pipeline.doctor.examine import Request, sum_arguments
from pipeline.doctor.facts import Answer, Clock, NodeFacts, SumAnswer, Sums
from pipeline.doctor.options import DoctorConfig
from pipeline.doctor.run_probe import run_probe, run_probes
from storage.errors import OutputError, Prox24Error
from storage.run.shared_folders import Marked, SharedFolder, marked, unanswered

# A process of Ray starts, and prox24's code arrives, well within this.
_START_SECONDS = 60.0
_CLOCK_ROUNDS = 5
_CLOCK_SECONDS = 5.0
# What is waited for beside the probes themselves.
_SLACK_SECONDS = 10.0
_ID_DIGITS = 6
_PREFIX = ".prox24-doctor-"


@dataclass(frozen=True)
class _Node:
    """A living node, by Ray's id, and the actor on it."""

    id: str
    name: str
    gpus: int
    actor: Any


def examine_cluster(
    config: DoctorConfig, environment: Mapping[str, str]
) -> tuple[list[NodeFacts], NodeFacts, Sums]:
    """The facts of all living nodes and of this driver, and the sum over all workers.

    This process is connected to the cluster. environment: of this driver's own probes.
    """
    names = node_names([entry for entry in ray.nodes() if entry.get("Alive")])
    gpus = {entry["NodeID"]: int(entry["Resources"].get("GPU", 0)) for entry in ray.nodes()}
    nodes = [_Node(id, name, gpus[id], _actor(id, config, gpus=0)) for id, name in names.items()]
    facts = _started(nodes)
    here = _driver(config, environment)
    with _marks(config, here) as marks:
        facts = _examined(nodes, facts, config, marks)
    facts = [
        fact if fact.problem else _timed(node, fact)
        for node, fact in zip(nodes, facts, strict=True)
    ]
    sums = _summed(nodes, facts, config)
    for node in nodes:
        with suppress(RayError):
            ray.kill(node.actor)
    return facts, here, sums


def node_names(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Names for people of nodes of `ray.nodes()`, by Ray's id, in their order.

    Host and address, and the id where several nodes have both alike.
    """
    plain = {e["NodeID"]: (e["NodeManagerHostname"], e["NodeManagerAddress"]) for e in entries}
    count = Counter(plain.values())
    names = {
        id: f"{host} ({address}{f', {id[:_ID_DIGITS]}' if count[host, address] > 1 else ''})"
        for id, (host, address) in plain.items()
    }
    return dict(sorted(names.items(), key=lambda item: item[1]))


def _actor(node: str, config: DoctorConfig, *, gpus: int) -> Any:
    """An actor on a node, which takes nothing of it but `gpus` GPUs."""
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"num_cpus": 0, "num_gpus": gpus, "max_restarts": 0, "scheduling_strategy": here}
    return ray.remote(NodeDoctor).options(**options).remote(config.network_interface)


def _started(nodes: Sequence[_Node]) -> list[NodeFacts]:
    """Facts of each node: those that start no process have a problem."""
    calls = {index: node.actor.clock.remote() for index, node in enumerate(nodes)}
    answers = _answers(calls, _START_SECONDS, "Ray starts no process there")
    return [
        NodeFacts(
            name=node.name,
            gpus=node.gpus,
            problem=answers[index].problem if isinstance(answers[index], Answer) else None,
        )
        for index, node in enumerate(nodes)
    ]


def _answers(calls: Mapping[int, Any], seconds: float, silent: str) -> dict[int, Any]:
    """What each call returns; an `Answer` with a problem for one that fails or is not in time."""
    found: dict[int, Any] = {}
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds)
    for index, each in calls.items():
        if each not in ready:
            found[index] = Answer(problem=f"{silent}: no answer in {seconds:g} s", hung=True)
            continue
        try:
            found[index] = ray.get(each)
        except (RayError, Prox24Error, OSError) as error:
            found[index] = Answer(problem=reason_of(error))
    return found


def _driver(config: DoctorConfig, environment: Mapping[str, str]) -> NodeFacts:
    """The driver's versions, and what it can do in the folders."""
    answers = run_probes(("versions",), {}, config.timeout, environment)
    for path in config.folders():
        asked = {"path": path, "mark": None, "rank": -1}
        answers[f"folder {path}"] = run_probe("folder", asked, config.timeout, environment)
    return NodeFacts(name=f"the driver on {socket.gethostname()}", answers=answers)


@contextmanager
def _marks(config: DoctorConfig, here: NodeFacts) -> Iterator[dict[str, Marked]]:
    """Markers in the folders in which the driver can write."""
    with ExitStack() as stack:
        made = {}
        for path in config.folders():
            answer = here.answers[f"folder {path}"]
            if answer.value is None or answer.value["problem"]:
                continue
            with suppress(OutputError):  # it could a moment ago
                folder = SharedFolder("the folder", path, _PREFIX)
                (made[path],) = stack.enter_context(marked([folder]))
        yield made


def _examined(
    nodes: Sequence[_Node],
    facts: Sequence[NodeFacts],
    config: DoctorConfig,
    marks: Mapping[str, Marked],
) -> list[NodeFacts]:
    """The facts with the answers of all probes."""
    folders = {
        path: {"place": mark.place, "word": mark.word, "prefix": _PREFIX}
        for path, mark in marks.items()
    }
    calls = {}
    for rank, (node, fact) in enumerate(zip(nodes, facts, strict=True)):
        if fact.problem is None:
            request = Request(folders=folders, rank=rank, seconds=config.timeout)
            calls[rank] = node.actor.examine.remote(request)
    # One after another: probes at once, each folder, the trial launch.
    limit = config.timeout * (2 + len(folders)) + _SLACK_SECONDS
    answers = _answers(calls, limit, "its checks do not end") if calls else {}
    found = []
    for rank, fact in enumerate(facts):
        answer = answers.get(rank)
        if answer is None:
            found.append(fact)
        elif isinstance(answer, Answer):
            found.append(replace(fact, problem=answer.problem))
        else:
            probes = _one_way(dict(answer[0]), marks, rank)
            found.append(replace(fact, answers=probes, environment=answer[1]))
    return found


def _one_way(
    answers: dict[str, Answer], marks: Mapping[str, Marked], rank: int
) -> dict[str, Answer]:
    """The answers, with a problem for a folder where the driver does not see the node's file."""
    for path, mark in marks.items():
        name = f"folder {path}"
        value = answers[name].value
        if value is not None and not value["problem"] and (missing := unanswered([mark], rank)):
            answers[name] = Answer({**value, "problem": missing[0]})
    return answers


def _timed(node: _Node, fact: NodeFacts) -> NodeFacts:
    """The facts with the node's clock: the quickest of several answers tells it best."""
    best: Clock | None = None
    for _ in range(_CLOCK_ROUNDS):
        before = time.time()
        try:
            told = ray.get(node.actor.clock.remote(), timeout=_CLOCK_SECONDS)
        except RayError:
            break
        after = time.time()
        within = (after - before) / 2
        if best is None or within < best.within:
            best = Clock(ahead=told - (before + after) / 2, within=within)
    return replace(fact, clock=best)


@dataclass(frozen=True)
class _Rank:
    """A rank of the sum: its actor and node, and whether it has a GPU that torch sees."""

    actor: Any
    node: NodeFacts
    on_gpu: bool


def _summed(nodes: Sequence[_Node], facts: Sequence[NodeFacts], config: DoctorConfig) -> Sums:
    """The sum over all workers: one a GPU where there are GPUs that work, else one a node."""
    able = [(n, f) for n, f in zip(nodes, facts, strict=True) if f.value("torch")]
    with_gpus = [(n, f) for n, f in able if n.gpus and f.value("torch")["devices"]]
    if not with_gpus:
        ranks = [_Rank(node.actor, fact, False) for node, fact in able]
        return _sum_of(ranks, config, 0)
    workers = [
        _Rank(_actor(node.id, config, gpus=1), fact, True)
        for node, fact in with_gpus
        for _ in range(min(node.gpus, len(fact.value("torch")["devices"])))
    ]
    calls = {index: rank.actor.clock.remote() for index, rank in enumerate(workers)}
    answers = _answers(calls, _START_SECONDS, "it is in use")
    ready = [rank for i, rank in enumerate(workers) if not isinstance(answers[i], Answer)]
    try:
        return _sum_of(ready, config, len(workers) - len(ready))
    finally:
        for rank in workers:
            with suppress(RayError):
                ray.kill(rank.actor)


def _sum_of(ranks: Sequence[_Rank], config: DoctorConfig, busy: int) -> Sums:
    if not ranks:
        reason = "all GPUs are in use by others" if busy else "torch answers on no node"
        return Sums(reason=reason, busy=busy)
    backend = "nccl" if all(rank.on_gpu for rank in ranks) else "gloo"
    met = _answers({0: ranks[0].actor.meeting.remote()}, _START_SECONDS, "rank 0")[0]
    if isinstance(met, Answer):
        first = SumAnswer(node=ranks[0].node.name, answer=met)
        return Sums(backend=backend, ranks=(first,), busy=busy)
    host, port = met
    calls = {}
    for number, rank in enumerate(ranks):
        device = "cuda:0" if rank.on_gpu else "cpu"
        asked = sum_arguments(number, len(ranks), host, port, backend, device, config.timeout)
        calls[number] = rank.actor.sum.remote(asked, config.timeout)
    answers = _answers(calls, config.timeout + _SLACK_SECONDS, "the sum")
    found = tuple(
        SumAnswer(node=rank.node.name, answer=answers[number]) for number, rank in enumerate(ranks)
    )
    return Sums(backend=backend, ranks=found, busy=busy)
