"""`prox24 doctor`: whether the nodes of a cluster, or this machine, can run a job; and if not, why.

Imports no torch: it is for machines where that fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from cluster.command import Command
from cluster.options import config_from
from cluster.terminal import as_text, terminal
from pipeline.config.runtime import RuntimeConfig
from pipeline.doctor.facts import Finding, NodeFacts, State, Sums
from pipeline.doctor.options import DoctorConfig

DOCTOR_SCHEMA = 1
_MARKS = {"ok": "ok", "warning": "WARNING", "wrong": "WRONG", "skipped": "-"}
_SHOWN_NODES = 4


def run(options: argparse.Namespace) -> int:
    """Examines, prints, and returns the exit status: 0, or 3 where something is wrong.

    Raises `ResourceError` where no cluster answers at the address.
    """
    config: DoctorConfig = config_from(options, DoctorConfig)
    from pipeline.doctor.judge import exit_status, judge

    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    on_ray = config.executor == "ray" and bool(address)
    before: list[Finding] = []
    driver: NodeFacts | None = None
    if on_ray:
        _tell(f"looking at the nodes of {address}")
        nodes, driver, sums, before = _on_cluster(config)
    else:
        from pipeline.doctor.examine import this_machine

        _tell("looking at this machine alone (--ray-address or $RAY_ADDRESS names a cluster)")
        node, sums = this_machine(config.folders(), config.timeout, os.environ)
        nodes = [node]
    findings = [*before, *judge(nodes, driver, sums)]
    if config.json:
        print(json.dumps(as_json(findings, nodes, driver, sums)))
    else:
        print(doctor_text(findings, [node.name for node in nodes]), end="")
    return exit_status(findings)


def _tell(text: str) -> None:
    terminal().print(text, markup=False, soft_wrap=True)


def _on_cluster(
    config: DoctorConfig,
) -> tuple[list[NodeFacts], NodeFacts, Sums, list[Finding]]:
    """The facts of the cluster's nodes and of this driver, the sum, and the dashboard."""
    environment = dict(os.environ)  # Ray adds to it
    import ray

    from cluster.dispatch.connection import connect_unguarded
    from cluster.dispatch.node_doctors import examine_cluster

    context = connect_unguarded(
        RuntimeConfig(ray_address=config.ray_address, verbose=config.verbose)
    )
    try:
        return *examine_cluster(config, environment), [_dashboard(context, config)]
    finally:
        ray.shutdown()


def _dashboard(context: Any, config: DoctorConfig) -> Finding:
    from cluster.dispatch.connection import require_guarded
    from storage.errors import ResourceError

    try:
        require_guarded(context, accept_open=False)
    except ResourceError as error:
        found, _, remedy = str(error).partition("; ")
        state: State = "warning" if config.open_dashboard else "wrong"
        return Finding(check="dashboard", state=state, found=found, remedy=remedy)
    where = "none" if not context.dashboard_url else f"{context.dashboard_url}, guarded"
    return Finding(check="dashboard", state="ok", found=where)


def doctor_text(findings: Sequence[Finding], nodes: Sequence[str]) -> str:
    """The table and the verdict, as text of at most 80 columns. nodes: names of all nodes."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(finding.check, _MARKS[finding.state], _cell(finding, nodes))
    return as_text([table, "", _verdict(findings, nodes)])


def _cell(finding: Finding, nodes: Sequence[str]) -> str:
    """What was found, on which nodes if not on all, and the remedy on a line of its own."""
    where = ""
    if finding.where and set(finding.where) != set(nodes):
        more = len(finding.where) - _SHOWN_NODES
        others = f" and {more} more" if more > 0 else ""
        where = f"{', '.join(finding.where[:_SHOWN_NODES])}{others}: "
    remedy = f"\nremedy: {finding.remedy}" if finding.remedy else ""
    return f"{where}{finding.found}{remedy}"


def _verdict(findings: Sequence[Finding], nodes: Sequence[str]) -> str:
    of = f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"
    counts = {state: sum(f.state == state for f in findings) for state in ("wrong", "warning")}
    if counts["wrong"]:
        return f"{of}: {counts['wrong']} wrong, {counts['warning']} warnings"
    if counts["warning"]:
        return f"{of}: nothing is wrong; {counts['warning']} warnings"
    return f"{of}: all is well"


def as_json(
    findings: Sequence[Finding], nodes: Sequence[NodeFacts], driver: NodeFacts | None, sums: Sums
) -> dict[str, Any]:
    """Everything that was found, with all facts of the nodes; sizes in bytes, times in seconds."""
    return {
        "schema_version": DOCTOR_SCHEMA,
        "ok": not any(finding.state == "wrong" for finding in findings),
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "nodes": [dataclasses.asdict(node) for node in nodes],
        "driver": None if driver is None else dataclasses.asdict(driver),
        "sum": dataclasses.asdict(sums),
    }


COMMAND = Command(
    name="doctor",
    help="check every node of a cluster, or this machine, before a job",
    epilog="Reads no model and changes nothing. Exit status 3: something is wrong; warnings alone "
    "leave it 0.",
    config=DoctorConfig,
    run=run,
)
