"""A plan as JSON values, for `prox24 plan --json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.models.text_forward import NOT_REACHED
from pipeline.planning.parts.phase_parts import Phase
from pipeline.planning.plan import PLAN_SCHEMA, Plan, scaling
from pipeline.planning.shapes.model import ModelShape


def plan_to_json(plan: Plan, *, scaled: bool = True) -> dict[str, Any]:
    """The plan with all parts of its phases, in seconds, bytes and counts.

    scaled: whether to add plans for other numbers of workers.
    """
    job = plan.job
    phases = {
        name: {**total, "limit": max(total["limits"], key=total["limits"].__getitem__)}
        for name, total in plan.totals().items()
    }
    return {
        "schema_version": PLAN_SCHEMA,
        "model": _model(job.shape),
        "job": {
            "settings": job.settings.to_json(),
            "nsamples": job.nsamples,
            "seqlen": job.seqlen,
            "batch_size": job.batch_size,
        },
        "experts": _experts(plan),
        "machine": {
            "workers": job.workers,
            "nodes": job.nodes,
            "device_memory": job.device_memory or None,
            "host_memory": job.host_memory,
            "disk": job.disk,
            "rates": job.rates.to_json(),
        },
        "seconds": plan.seconds,
        "phases": phases,
        "blocks": [
            {
                "first": block.first,
                "last": block.last,
                "seconds": block.seconds,
                "phases": [_phase(plan, phase) for phase in block.phases],
            }
            for block in plan.blocks
        ],
        "once": [_phase(plan, phase) for phase in (*plan.before, *plan.after)],
        "disk_bytes": plan.disk_bytes,
        "network_bytes": plan.network_bytes,
        "needs": [{**dataclasses.asdict(need), "fits": need.fits} for need in plan.needs()],
        "problems": [
            {"what": need.what, "where": need.where, "remedies": list(options)}
            for need, options in plan.problems()
        ],
        "scaling": [
            {"workers": workers, "seconds": other.seconds} for workers, other in scaling(job)
        ]
        if scaled
        else [],
    }


def _model(shape: ModelShape) -> dict[str, Any]:
    return {
        "name": shape.name,
        "parameters": shape.parameters,
        "weight_bytes": shape.weight_bytes,
        "blocks": len(shape.blocks),
        "block_kinds": len(shape.kinds),
        "hidden": shape.hidden,
        "dtype": shape.dtype,
        "skipped_because": {f"block {b}": NOT_REACHED for b in shape.passed_by},
        "stored_as": shape.stored_as or None,
    }


def _experts(plan: Plan) -> list[dict[str, Any]]:
    """Each distinct group of experts, with evenly routed tokens; `needs` are for any routing."""
    groups = dict.fromkeys(g for kind in plan.job.shape.kinds for g in kind.groups if g.active)
    return [
        {
            "layers": [name for name, _, _ in group.layers],
            "experts": group.experts,
            "experts_per_token": group.active,
            "tokens_each": plan.job.tokens(group),
            "columns": group.columns,
            "inputs_kept": plan.job.inputs(group) is not None,
            "method": plan.job.solved_with(group).method,
        }
        for group in groups
    ]


def _phase(plan: Plan, phase: Phase) -> dict[str, Any]:
    return {
        "name": phase.name,
        "seconds": phase.seconds,
        "limit": phase.limit,
        "host_bytes": plan.host_bytes(phase),
        "device_bytes": plan.device_bytes(phase),
        "read_bytes": phase.read,
        "written_bytes": phase.written,
        "network_bytes": phase.sent,
        "parts": [
            {"what": part.what, "limit": part.limit, "seconds": part.seconds}
            for part in phase.parts
            if part.seconds
        ],
    }
