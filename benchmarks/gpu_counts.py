"""What the phases of a large model's block do on GPUs, counted without one, against the plan.

    python benchmarks/gpu_counts.py --model 70b --workers 8      # prints tables in Markdown
    python benchmarks/gpu_counts.py --model 405b --workers 16    # two to three minutes

The project's own code runs at the model's real shapes on the fake GPU of the tests, with tensors
without data: no memory, no arithmetic. For each figure the table has the rank with most of it, the
plan's figure, and the plan's over the count. What the code reads of its data is resolved as
`tests/support/fake_gpu/without_data.py` says: sums are finite, matrices positive definite.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.plan import MODELS, table
from pipeline.config.layers import LayerRules
from pipeline.planning.options import PlanConfig, planned_job
from pipeline.planning.shapes.model import read_shape
from tests.support.gpu_counts import Counts, count_phases, planned

NAMES = {"70b": "Llama-3.1-70B", "405b": "Llama-3.1-405B"}
WORKERS = {"70b": 8, "405b": 16}
_BLOCKS = 3  # a first, a middle and a last one are all there is to see
_FACTORS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def number(value: float) -> str:
    """Four digits and a factor: `12.3 G`."""
    for factor, letter in _FACTORS:
        if value >= factor:
            return f"{value / factor:.4g} {letter}"
    return f"{value:.4g}"


def rows_of(name: str, found: Counts, plan: Counts) -> list[list[str]]:
    """The rows of a phase: each figure that is not 0."""
    rows = []
    for figure, count in found.figures().items():
        expected = plan.figures()[figure]
        if not count and not expected:
            continue
        shown, ratio = "", ""
        if expected is not None:
            shown = number(expected)
            ratio = f"{expected / count:.2f}" if count and expected else ""
        rows.append([name, figure, number(count or 0.0), shown, ratio])
    return rows


def count(model: str, workers: int, method: str) -> str:
    """The table of one model, in Markdown."""
    config = MODELS[NAMES[model]] | {"num_hidden_layers": _BLOCKS}
    options = PlanConfig(gpus=workers, method=method, reconstruct="none")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        rules = LayerRules(settings=options.solver_settings(method))
        job = planned_job(read_shape(path, seqlen=options.seqlen, rules=rules), options)
        found, plan = count_phases(path, job, Path(folder)), planned(job)
    rows = [["phase", "what", "counted", "plan", "plan / counted"]]
    for name, counts in found.items():
        rows += rows_of(name, counts, plan[name])
    return table(rows, left=2)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=NAMES, default="70b")
    parser.add_argument("--workers", type=int, help="GPUs; unset: 8 for 70b, 16 for 405b")
    parser.add_argument("--method", default="prox_admm")
    options = parser.parse_args()
    workers = options.workers or WORKERS[options.model]
    print(f"{NAMES[options.model]}, {options.method}, {workers} GPUs, 128 x 2,048 tokens\n")
    print(count(options.model, workers, options.method))


if __name__ == "__main__":
    main()
