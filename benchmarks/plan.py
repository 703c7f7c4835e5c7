"""Plans of large models on H100s, as `prox24 plan` makes them, written to plan.md.

    python benchmarks/plan.py            # writes benchmarks/plan.md

Only public numbers go in: the models' config.json values, a data sheet, and the efficiencies that
`pipeline/planning/rates.py` states. Nothing here has run on so many GPUs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config.solver import SolverSettings
from pipeline.planning import phases
from pipeline.planning import planned_job as planning
from pipeline.planning.options import PlanConfig, planned_job
from pipeline.planning.parts.phase_parts import merge
from pipeline.planning.plan import Plan
from pipeline.planning.planned_job import PlannedJob
from pipeline.planning.rates import gpu_rates
from pipeline.planning.shapes.model import ModelShape, read_shape
from pipeline.runtime.background import FILE_THREADS
from pipeline.runtime.units import size_text
from pipeline.solvers.cost import SolveCost
from pipeline.solvers.registry import solve_cost
from pipeline.worker import solve as solving

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "dtype": "bfloat16",
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "num_key_value_heads": 8,
}  # fmt: skip
MODELS = {
    "Llama-3.1-70B": _LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "Llama-3.1-405B": _LLAMA | {
        "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
    "Qwen3-235B-A22B": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936,
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
        "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu",
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    },
}  # fmt: skip
GPUS = (8, 16, 64)
METHODS = ("prox_admm", "sparsegpt", "wanda")
GOAL_SECONDS = 3600


def shape_of(name: str) -> ModelShape:
    """The model's shape, from its config.json alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(MODELS[name]))
        return replace(read_shape(path, seqlen=2048), name=name)


def minutes(seconds: float) -> str:
    """`1 h 02 min` or `34 min`."""
    whole = round(seconds / 60)
    return f"{whole // 60} h {whole % 60:02d} min" if whole >= 60 else f"{whole} min"


def table(rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table; the first `left` columns are left-aligned."""
    line = [" --- " if i < left else " ---: " for i in range(len(rows[0]))]
    text = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([text[0], f"|{'|'.join(line)}|", *text[1:]])


def overview(shapes: dict[str, ModelShape]) -> str:
    rows = [["model", "method", "GPUs", "time", "solve", "advance", "other", "GPU peak",
             "host, a worker", "disk", "between GPUs", "most time goes to"]]  # fmt: skip
    for name, shape in shapes.items():
        for method in METHODS:
            for gpus in GPUS:
                config = PlanConfig(gpus=gpus, method=method)
                plan = Plan(planned_job(shape, config))
                totals = plan.totals()
                solve = totals["solve"]["seconds"]
                advance = totals["advance"]["seconds"]
                limits: dict[str, float] = {}
                for total in totals.values():
                    for limit, seconds in total["limits"].items():
                        limits[limit] = limits.get(limit, 0.0) + seconds
                most = max(limits, key=limits.__getitem__)
                peaks = [(plan.device_bytes(p), plan.host_bytes(p)) for _, _, p in plan.phases()]
                rows.append([
                    name, method, str(gpus), minutes(plan.seconds), minutes(solve),
                    minutes(advance), minutes(plan.seconds - solve - advance),
                    size_text(max(p[0] for p in peaks)), size_text(max(p[1] for p in peaks)),
                    size_text(sum(plan.disk_bytes.values())), size_text(plan.network_bytes),
                    f"{most} {100 * limits[most] / plan.seconds:.0f} %",
                ])  # fmt: skip
    return table(rows, left=2)


def parts_of_a_block(shape: ModelShape) -> str:
    """Where the seconds of one block go, by number of GPUs."""
    names: dict[str, dict[int, float]] = {}
    for gpus in GPUS:
        plan = Plan(planned_job(shape, PlanConfig(gpus=gpus)))
        for phase in plan.blocks[-2].phases:
            for part in merge(phase.parts):
                own = names.setdefault(f"{phase.name}: {part.what} ({part.limit})", {})
                own[gpus] = part.seconds
    kept = {n: s for n, s in names.items() if max(s.values()) >= 0.1}
    rows = [["part", *(f"{gpus} GPUs" for gpus in GPUS)]]
    rows += [[n, *(f"{s.get(g, 0.0):.2f} s" for g in GPUS)] for n, s in kept.items()]
    return table(rows)


class _SharedInverse(phases.PhaseModel):
    """What if a group's inverse were computed by all ranks together and not by each? Rows are
    then dealt as if it cost each a share."""

    def __init__(self, job: PlannedJob) -> None:
        super().__init__(job)

        def shared(settings: SolverSettings, columns: int, device: str) -> SolveCost:
            cost = solve_cost(settings, columns, device)
            return replace(cost, fixed=cost.fixed / self.job.workers)

        solving.solve_cost = shared
        planning._deal.cache_clear()

    def _group(self, group, rows):  # type: ignore[no-untyped-def]
        parts = super()._group(group, rows)
        gathered = 8.0 * group.columns**2 / self.rates.link
        share = 1 / self.job.workers
        return [
            replace(p, seconds=p.seconds * share + gathered) if "same on all" in p.what else p
            for p in parts
        ]


def what_if(shapes: dict[str, ModelShape]) -> str:
    """The same plans with changes of design, each alone and all together."""
    rows = [["model", "GPUs", "as it is", "inverse shared", "local copy of the weights",
             "slices not hashed again", "all three"]]  # fmt: skip
    plain = phases.PhaseModel

    def seconds(shape: ModelShape, gpus: int, model: type, **rates: float) -> float:
        from pipeline.planning import plan as module

        module.PhaseModel = model  # type: ignore[misc]
        try:
            job = planned_job(shape, PlanConfig(gpus=gpus))
            return Plan(replace(job, rates=replace(gpu_rates("H100"), **rates))).seconds
        finally:
            module.PhaseModel = plain  # type: ignore[misc]
            solving.solve_cost = solve_cost
            planning._deal.cache_clear()

    class Unhashed(plain):  # type: ignore[misc, valid-type]
        def _advance(self, *arguments):  # type: ignore[no-untyped-def]
            phase = super()._advance(*arguments)
            own = tuple(p for p in phase.parts if p.what != "verify slices")
            return replace(phase, parts=own)

    class Both(Unhashed, _SharedInverse):
        pass

    for name, shape in shapes.items():
        for gpus in GPUS:
            nodes = max(1, gpus // 8)
            local = {"disk_read": 10e9 * nodes, "disk_write": 5e9 * nodes}
            cells = [
                seconds(shape, gpus, plain),
                seconds(shape, gpus, _SharedInverse),
                seconds(shape, gpus, plain, **local),
                seconds(shape, gpus, Unhashed),
                seconds(shape, gpus, Both, **local),
            ]
            rows.append([name, str(gpus), *map(minutes, cells)])
    return table(rows)


def assumptions() -> str:
    """The rates of the plans, as a table."""
    rates, tera, giga = gpu_rates("H100"), 1e12, 1e9
    disk = f"reads {rates.disk_read / giga:.0f} GB/s, writes {rates.disk_write / giga:.0f} GB/s"
    waits = f"start {rates.start:.0f} s, phase {1000 * rates.dispatch:.0f} ms"
    waits += f", fsync {1000 * rates.sync:.0f} ms, operator {1e6 * rates.operator:.0f} us"
    rows = [
        ("what", "value"),
        ("bf16 products", f"{rates.bfloat16 / tera:.0f} TFLOP/s (60 % of 989)"),
        ("Hessians, bf16 inputs in TF32", f"{rates.statistics / tera:.0f} TFLOP/s (60 % of 495)"),
        ("fp32 products of a solve", f"{rates.float32 / tera:.0f} TFLOP/s (75 % of 67)"),
        ("TF32 products of iterations", f"{rates.tf32 / tera:.0f} TFLOP/s (83 % of 495)"),
        ("fp32 inverse by blocks", f"{rates.inverse / tera:.0f} TFLOP/s (55 %)"),
        ("float64 products", f"{rates.float64 / tera:.0f} TFLOP/s (70 % of 67)"),
        ("float64 factor", f"{rates.factor / tera:.0f} TFLOP/s (55 %)"),
        ("attention", f"{rates.attention / tera:.0f} TFLOP/s (30 % of 989)"),
        ("HBM", f"{rates.memory / tera:.2f} TB/s (70 % of 3.35)"),
        ("an iteration of a solve", "moves 92 bytes for each entry of the rows"),
        ("shared filesystem", f"{disk} in all; each node reads a weight once"),
        ("SHA-256", f"{rates.hash / giga:.1f} GB/s a thread, on a core with SHA extensions"),
        ("files hashed at a time", f"{FILE_THREADS} a worker, on as many cores"),
        ("SHA-256 and the check for NaN", f"{rates.check / giga:.1f} GB/s a worker"),
        ("file cache to GPU", f"{rates.copy / giga:.0f} GB/s a worker"),
        ("between GPUs of a node", f"{rates.link / giga:.0f} GB/s each way (60 % of NVLink's 450)"),
        ("between nodes", f"{rates.network / giga:.0f} GB/s a GPU"),
        ("waits", waits),
    ]  # fmt: skip
    return table([list(row) for row in rows], left=2)


def main() -> None:
    shapes = {name: shape_of(name) for name in MODELS}
    goal = Plan(planned_job(shapes["Llama-3.1-70B"], PlanConfig(gpus=8))).seconds
    mixture = Plan(planned_job(shapes["Qwen3-235B-A22B"], PlanConfig(gpus=8)))
    verdict = "is met" if goal < GOAL_SECONDS else "is NOT met"
    text = TEMPLATE.format(
        overview=overview(shapes),
        goal=f"{minutes(goal)}: the goal of one hour {verdict}",
        seventy=parts_of_a_block(shapes["Llama-3.1-70B"]),
        four=parts_of_a_block(shapes["Llama-3.1-405B"]),
        what_if=what_if(shapes),
        assumptions=assumptions(),
        share=f"{8 * 128 * 2048 // 128:,} tokens",
        uneven=size_text(next(n.needs for n in mixture.needs() if n.what == "device memory")),
    )
    (Path(__file__).parent / "plan.md").write_text(text, encoding="utf-8")


TEMPLATE = """\
# What large models would take

Written by `python benchmarks/plan.py`; the same as `prox24 plan config.json --gpus N` prints, with
every option at its default: 128 x 2,048 tokens, batches of 4, 2:4, 8 GPUs to a node. **These are
predictions from shapes, a data sheet (NVIDIA H100 SXM, 80 GB) and stated efficiencies. No such run
has been made.**

{overview}

Llama-3.1-70B, prox_admm, 8 GPUs: {goal}.

In Qwen3-235B-A22B each expert's matrices are layers of their own and are taken to see 8 of 128 of
the tokens, an even share: {share}. Real routing is uneven, which changes what experts hold:
the GPU peak is {uneven} at most (prox_admm, 8 GPUs). A turn of groups is bounded by half of the
GPU's memory as if each expert in it held a whole matrix.

## Where a block's time goes (prox_admm)

Llama-3.1-70B:

{seventy}

Llama-3.1-405B:

{four}

## What would make it faster

{what_if}

- *Inverse shared*: every rank that solves rows of a group inverts the group's whole C x C by
  itself, twice. The inverse consists of products of panels, which could be divided over the ranks;
  the column assumes that, the gathering of the result, and rows dealt accordingly.
- *Local copy of the weights*: every node reads each block's weights from the shared filesystem. The
  column assumes that reads and writes grow with the nodes (each with a disk of its own at 10 and
  5 GB/s).
- *Slices not hashed again*: every rank verifies all of a block's row slices before it loads them,
  several files at a time.

## Assumptions

{assumptions}

A plan adds up what the busiest rank does in each phase. Reads ahead and writes behind hide behind
computation but for the first piece, and the shorter of the two behind the longer. Rows are dealt as
the workers deal them.
"""

if __name__ == "__main__":
    main()
