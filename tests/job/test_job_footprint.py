"""What a job leaves on disk, reads and imports, and which process sees which rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.config.solver import SolverSettings
from pipeline.loop.rank import Call
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import Statistics
from pipeline.worker.block_worker import Job, Outcome
from pipeline.worker.local_executor import LocalExecutor
from tests.support.jobs import check_output, prune_here, write_text
from tests.support.processes import CONTEXT
from tests.support.solver_cases import layer

TinyModel = Callable[..., Path]


class Watching(LocalExecutor):
    """The local executor, with a look at the run directory after each phase."""

    def __init__(self, world: int, look: Callable[[str, Path], None]) -> None:
        super().__init__(world, 1)
        self.look = look

    def start(self, job: Job) -> None:
        super().start(job)
        self.folder = Path(job.run_directory)

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        outcomes = super().run(calls)
        self.look(calls[0].phase, self.folder)
        return outcomes


def test_two_activation_stores_at_most(tiny_model: TinyModel, tmp_path: Path) -> None:
    stores: list[tuple[str, list[str]]] = []

    def look(phase: str, run: Path) -> None:
        stores.append((phase, sorted({p.parent.name for p in run.glob("activations/*/*.arrow")})))

    result = prune_here(
        tiny_model("llama", blocks=4), tmp_path / "output", workers=2, executor=Watching(2, look)
    )
    assert ("calibrate", ["block-000"]) in stores
    assert ("advance", ["block-002", "block-003"]) in stores
    assert ("solve", ["block-003"]) in stores
    assert max(len(names) for _, names in stores) == 2
    assert not list(result.run_directory.glob("activations/*"))


def test_magnitude_needs_no_activations(tiny_model: TinyModel, tmp_path: Path) -> None:
    seen: list[str] = []

    def look(phase: str, run: Path) -> None:
        seen.append(phase)
        assert not list(run.glob("activations/*/*"))

    prune_here(
        tiny_model("llama"), tmp_path / "output", method="magnitude", executor=Watching(1, look)
    )
    assert seen == ["free_memory", "fingerprint", "solve", "solve", "write_output"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_stores_are_plain_arrow(
    tiny_model: TinyModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Block 1's inputs are the outputs of pruned block 0, by the finished model's own forward."""
    stores: dict[str, list[pa.Table]] = {}

    def look(phase: str, run: Path) -> None:
        if phase == "advance":
            for path in sorted(run.glob("activations/block-001/*.arrow")):
                table = pa.ipc.open_file(path.read_bytes()).read_all()
                stores.setdefault("inputs", []).append(table)
            tokens = pa.ipc.open_file((run / "tokens.arrow").read_bytes()).read_all()
            stores["tokens"] = [tokens]

    source = tiny_model("llama", dtype=dtype)
    output = prune_here(source, tmp_path / "output", executor=Watching(1, look)).output
    assert [table.num_rows for table in stores["inputs"]] == [4, 4]
    found = []
    for index, table in enumerate(stores["inputs"]):
        facts = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        assert facts["dtype"] == str(dtype).removeprefix("torch.")
        assert facts["stored_as"] == ("uint16" if dtype == torch.bfloat16 else "float32")
        assert (json.loads(facts["shape"]), facts["block"]) == ([32, 32], "1")
        assert (facts["shard"], facts["schema_version"]) == (str(index), "1")
        for chunk in table.column("hidden_states").chunks:
            # A copy: from_numpy must not be given the read-only memory of a table.
            found.append(torch.from_numpy(chunk.to_numpy_ndarray().copy()).view(dtype))
    ids = stores["tokens"][0].column("input_ids").chunk(0).to_numpy_ndarray()
    model = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids.copy()).long(), output_hidden_states=True)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        torch.cat(found), expected.hidden_states[1], rtol=tolerance, atol=tolerance
    )


def test_each_rank_writes_its_own_rows_only(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Of three ranks none solves, or writes, what another does, and none is without work."""
    rows: dict[str, dict[str, int]] = {}

    def look(phase: str, run: Path) -> None:
        if phase == "solve":
            for path in sorted(run.glob("checkpoints/block-000/rank-*.safetensors")):
                slices = load_file(path)
                rows[path.name.split(".")[0]] = {name: len(part) for name, part in slices.items()}

    prune_here(
        tiny_model("llama", blocks=1), tmp_path / "output", workers=3, executor=Watching(3, look)
    )
    assert rows.keys() == {"rank-0", "rank-1", "rank-2"}
    assert all(rows.values())
    written: Counter[str] = Counter()
    for own in rows.values():
        written.update({name.split(".")[-1]: count for name, count in own.items()})
    assert written == {
        "q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32,
        "gate_proj": 64, "up_proj": 64, "down_proj": 32,
    }  # fmt: skip


class Elsewhere:
    """An executor whose one rank lives in another process, so that this one is a driver only."""

    world, threads = 1, 1

    def __init__(self) -> None:
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(theirs,))
        self.process.start()

    def start(self, job: Job) -> None:
        self._call("start", job)

    def run(self, calls: Sequence[Call[Any]]) -> list[Outcome[Any]]:
        return self._call("run", calls)

    def reduce(self) -> list[Outcome]:
        return self._call("reduce")

    def prepare(self) -> None:
        pass

    def recover(self) -> None:
        self._call("recover")

    def workers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._call("workers")
        return found

    def close(self) -> None:
        self._call("close")
        self.connection.send(None)
        self.process.join(60)

    def _call(self, *call: Any) -> Any:
        self.connection.send(call)
        return self.connection.recv()


def serve(connection: Any) -> None:
    """Process: a local executor that does what it is told."""
    executor = LocalExecutor(1, 1)
    while (call := connection.recv()) is not None:
        connection.send(getattr(executor, call[0])(*call[1:]))


def test_the_driver_reads_no_weights(tiny_model: TinyModel, tmp_path: Path) -> None:
    """By the kernel's count of the bytes that this process reads from files and pipes."""
    source = tiny_model("llama", hidden=128, intermediate=4096, weight_files=4)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    executor: Any = Elsewhere()
    before = psutil.Process().io_counters().read_chars
    output = prune_here(source, tmp_path / "output", method="magnitude", executor=executor).output
    read = psutil.Process().io_counters().read_chars - before
    assert size > 12 << 20
    assert read < size / 10
    check_output(source, output)


# -- three processes, one layer ------------------------------------------------------------------

SEPARABLE = ("wanda", "sparsegpt", "prox", "prox_admm")


def solve_slices(folder: Path, rank: int) -> None:
    """Process: solves its row slice of the layer with every method; it has no other rows."""
    torch.set_num_threads(1)
    sums = load_file(folder / "statistics.safetensors")
    statistics = Statistics(
        columns=sums["hessian"].shape[0],
        tokens=int(sums["tokens"]),
        sequences=int(sums["sequences"]),
        diagonal=sums["diagonal"],
        hessian=sums["hessian"],
    )
    rows = load_file(folder / f"rows-{rank}.safetensors")["rows"]
    solved = {}
    for method in SEPARABLE:
        solver = solver_for(SolverSettings(method=method))
        solved[method] = solver.solve(rows, solver.prepare(statistics)).weight
    save_file(solved, folder / f"solved-{rank}.safetensors")


def test_one_layer_solved_by_three_processes(tmp_path: Path) -> None:
    """None of which saw all its rows; the slices together are the whole layer's solution."""
    weight, inputs = layer(rows=50, columns=64, tokens=256)
    x = inputs.reshape(-1, 64)
    hessian = x.T @ x
    counts = {"tokens": torch.tensor(len(x)), "sequences": torch.tensor(2)}
    sums = {"hessian": hessian, "diagonal": hessian.diagonal().clone()}
    save_file(sums | counts, tmp_path / "statistics.safetensors")
    for rank, rows in enumerate(weight.tensor_split(3)):
        save_file({"rows": rows.clone()}, tmp_path / f"rows-{rank}.safetensors")
    processes = [CONTEXT.Process(target=solve_slices, args=(tmp_path, rank)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    parts = [load_file(tmp_path / f"solved-{rank}.safetensors") for rank in range(3)]
    statistics = Statistics(
        columns=64, tokens=len(x), sequences=2, diagonal=sums["diagonal"], hessian=hessian
    )
    for method in SEPARABLE:
        solver = solver_for(SolverSettings(method=method))
        whole = solver.solve(weight, solver.prepare(statistics)).weight
        assert torch.equal(torch.cat([part[method] for part in parts]), whole), method


# -- without Ray ---------------------------------------------------------------------------------

WITHOUT = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in ("ray", "datasets"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
from cluster.command_line import run
status = run(sys.argv[1:])
print("loaded:", sorted({"ray", "datasets"} & set(sys.modules)))
sys.exit(status)
"""


def test_the_local_executor_needs_neither_ray_nor_datasets(
    tiny_model: TinyModel, tmp_path: Path, repository: Path
) -> None:
    """In an interpreter in which importing either fails."""
    source, text = tiny_model("llama"), write_text(tmp_path / "text.txt")
    options = ["--executor", "local", "--dataset", text, "--seqlen", "32", "--threads", "1"]
    for command in (
        ["prune", source, tmp_path / "output", *options, "--nsamples", "8"],
        ["eval", tmp_path / "output", *options, "--nsamples", "4"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT, *map(str, command)],
            cwd=repository,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("loaded: []\n")
    check_output(source, tmp_path / "output")
