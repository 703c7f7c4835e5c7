"""What is known of a node, and what is made of it. Plain values: they pass between processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ok", "warning", "wrong", "skipped"]
"""Of a finding. warning: it may do harm. wrong: a job would fail, or be slow or wrong. skipped: it
was not looked at, and why."""


@dataclass(frozen=True)
class Answer:
    """What a probe found, as JSON values; None where it did not answer, and then `problem`.

    hung: it was still running when its time was over.
    """

    value: Mapping[str, Any] | None = None
    problem: str | None = None
    hung: bool = False


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The clock of a node beside the driver's, in seconds.

    ahead: how far it is ahead, or with a minus behind. within: the most that this may be off.
    """

    ahead: float
    within: float

    @property
    def certain(self) -> float:
        """The least by which the two clocks differ."""
        return max(abs(self.ahead) - self.within, 0.0)


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """All that is known of one node.

    name: host, and address where the cluster knows one. gpus: GPUs that Ray says it has; None
    without Ray. answers: of the probes (`pipeline.doctor.probes`), by name. environment: variables
    that change behaviour, without secrets. problem: why the whole node does not answer.
    """

    name: str
    gpus: int | None = None
    answers: Mapping[str, Answer] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    clock: Clock | None = None
    problem: str | None = None

    def value(self, probe: str) -> Mapping[str, Any]:
        """What the probe found; empty if it did not answer, or was not asked."""
        return self.answers.get(probe, Answer()).value or {}


@dataclass(frozen=True, kw_only=True)
class SumAnswer:
    """One rank of the sum over all workers. node: the name of its node."""

    node: str
    answer: Answer


@dataclass(frozen=True, kw_only=True)
class Sums:
    """The sum over all workers. busy: GPUs on which no worker started, because others use them.

    backend: of the common group. reason: why there was none; "" if there was.
    """

    backend: str = ""
    ranks: tuple[SumAnswer, ...] = ()
    busy: int = 0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the table. where: names of nodes; empty if it is of no node. remedy: if any."""

    check: str
    state: State
    found: str
    where: tuple[str, ...] = ()
    remedy: str = ""
