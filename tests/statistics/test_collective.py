"""Sums over real processes: bytes that depend on the ranks alone, and an error when one dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.solver import SolverSettings
from pipeline.solvers.base import BaseSolver
from pipeline.solvers.registry import solver_for
from pipeline.solvers.types import Statistics
from pipeline.statistics import all_reduce as collective
from pipeline.statistics.accumulate import Accumulator, Sums, add_in_rank_order
from pipeline.statistics.all_reduce import Collective, host_meeting
from storage.errors import WorkerLostError
from tests.support.processes import CONTEXT
from tests.support.solver_cases import layer, statistics_of

WORLD = 3
HOST = "127.0.0.1"

Start = Callable[..., list[Any]]


def own_sums(rank: int, columns: int, needs: str) -> Sums:
    """What `rank` brings: any numbers, of very unequal size, so that the order of adding shows."""
    generator = torch.Generator().manual_seed(rank)

    def values(count: int) -> torch.Tensor:
        size = 10.0 ** torch.randint(-9, 10, (count,), generator=generator).double()
        return torch.randn(count, generator=generator).double() * size

    full = needs == "full"
    diagonal, matrix = values(0 if full else columns), values(columns**2 if full else 0)
    return Sums(columns, 100 + rank, 1 + rank, diagonal, matrix)


def kept_sums(rank: int, columns: int) -> Sums:
    """What `rank` brings of an expert: `rank` inputs, in a batch each, kept as they are."""
    found = Accumulator(columns, "full", torch.device("cpu"), keep=True)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(rank):
        found.add(torch.randn(1, columns, generator=generator), 1)
    return found.sums


# Columns of experts whose three inputs, of all ranks, are kept (4) and are not (3).
KEPT = (4, 3)


def join(rank: int, ports: Any, timeout: float) -> Collective:
    """The group of all ranks; rank 0 tells the others its port through the queue."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if rank == 0:
        store = host_meeting(HOST)
        for _ in range(WORLD - 1):
            ports.put(store.port)
        return Collective(0, WORLD, store, "gloo", timeout)
    return Collective.join(rank, WORLD, HOST, ports.get(), "gloo", timeout)


def sum_and_save(rank: int, ports: Any, folder: Path, chunk: int) -> None:
    """Process: sums two groups' statistics, one in chunks that do not divide it, and saves them."""
    collective._CHUNK_BYTES = chunk
    group = join(rank, ports, 60)
    for columns, needs in ((37, "full"), (50, "diagonal")):
        total = group.sum_statistics(own_sums(rank, columns, needs))
        tensors = {"counts": torch.tensor([total.tokens, total.sequences])}
        tensors |= {"diagonal": total.diagonal, "matrix": total.matrix}
        tensors["sent"] = torch.tensor([group.sent])
        group.sent = 0
        save_file(tensors, folder / f"{needs}-{rank}.safetensors")
    for columns in KEPT:
        total = group.sum_statistics(kept_sums(rank, columns))
        tensors = {"counts": torch.tensor([total.tokens, total.sequences]), "matrix": total.matrix}
        tensors["inputs"] = total.kept()
        save_file(tensors, folder / f"kept-{columns}-{rank}.safetensors")
    group.close()


TEAMS = ((0, 2), (1, 2), (0, 1, 2))


def solve_together(rank: int, ports: Any, folder: Path) -> None:
    """Process: solves its rows of a layer in each team that it is in, twice."""
    group = join(rank, ports, 60)
    statistics, weight, solver = problem()
    for team in TEAMS:
        made = group.team(team)
        assert (made is None) == (rank not in team)
        if made is None:
            continue
        at, size = team.index(rank), len(team)
        rows = slice(at * len(weight) // size, (at + 1) * len(weight) // size)
        prepared = replace(solver.prepare(statistics), team=made)
        for turn in range(2):
            name = "-".join(map(str, (*team, "rows", at, turn)))
            found = solver.solve(weight[rows], prepared).weight
            sent = torch.tensor(group.take_sent())
            save_file({"weight": found, "sent": sent}, folder / f"{name}.safetensors")
    group.close()


def problem() -> tuple[Statistics, torch.Tensor, BaseSolver]:
    weight, inputs = layer(rows=96, columns=300, tokens=700)
    return statistics_of(inputs), weight, solver_for(SolverSettings().resolved())


def solve_until_lost(rank: int, ports: Any, ready: Any, errors: Any) -> None:
    """Process: as `sum_until_lost`, with solves in a team of all."""
    group = join(rank, ports, 120)
    statistics, weight, solver = problem()
    try:
        for turn in range(1_000_000):
            prepared = replace(solver.prepare(statistics), team=group.team((0, 1, 2)))
            solver.solve(weight[:16], prepared)
            if turn == 1:
                ready.put(rank)
    except WorkerLostError as error:
        errors.put((rank, str(error)))
        group.close()


def sum_until_lost(rank: int, ports: Any, ready: Any, errors: Any) -> None:
    """Process: sums again and again; says when it has begun, and what ended it."""
    group = join(rank, ports, 120)
    try:
        for turn in range(1_000_000):
            group.sum(torch.ones(1000))
            if turn == 3:
                ready.put(rank)
    except WorkerLostError as error:
        errors.put((rank, str(error)))
        group.close()


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts one process per rank; whatever is left of them is killed at the end."""
    processes: list[Any] = []
    ports = CONTEXT.Queue()  # kept here: a queue vanishes with its last reference in this process

    def start(target: Any, *arguments: Any) -> list[Any]:
        for rank in range(WORLD):
            processes.append(CONTEXT.Process(target=target, args=(rank, ports, *arguments)))
            processes[-1].start()
        return processes

    yield start
    for process in processes:
        process.kill()
        process.join()


@pytest.mark.parametrize("chunk", [1 << 28, 800])
def test_bytes_are_those_of_adding_in_rank_order(tmp_path: Path, start: Start, chunk: int) -> None:
    for process in start(sum_and_save, tmp_path, chunk):
        process.join(60)
        assert process.exitcode == 0
    for columns, needs in ((37, "full"), (50, "diagonal")):
        own = [own_sums(rank, columns, needs) for rank in range(WORLD)]
        expected = add_in_rank_order(own)
        for rank in range(WORLD):
            found = load_file(tmp_path / f"{needs}-{rank}.safetensors")
            assert found["counts"].tolist() == [expected.tokens, expected.sequences]
            assert torch.equal(found["diagonal"], expected.diagonal)
            assert torch.equal(found["matrix"], expected.matrix)
            # Out once and in once, but for a rank's own part: no more than rounding up to it.
            size, chunks = expected.nbytes, 2 + expected.nbytes // chunk
            assert size >= 8 * (columns**2 if needs == "full" else columns)
            least = 2 * (WORLD - 1) * size // WORLD
            assert least <= int(found["sent"]) <= least + 16 * WORLD * chunks
    for columns in KEPT:
        expected = add_in_rank_order([kept_sums(rank, columns) for rank in range(WORLD)])
        assert (expected.inputs is not None) == (columns == 4)
        for rank in range(WORLD):
            found = load_file(tmp_path / f"kept-{columns}-{rank}.safetensors")
            assert found["counts"].tolist() == [3, 3]
            assert torch.equal(found["inputs"], expected.kept())
            assert torch.equal(found["matrix"], expected.matrix)


def test_teams_of_ranks_solve_to_the_bytes_of_one(tmp_path: Path, start: Start) -> None:
    for process in start(solve_together, tmp_path):
        process.join(60)
        assert process.exitcode == 0
    statistics, weight, solver = problem()
    expected = solver.solve(weight, solver.prepare(statistics)).weight
    for team in TEAMS:
        for turn in range(2):
            parts = [
                load_file(tmp_path / f"{'-'.join(map(str, (*team, 'rows', at, turn)))}.safetensors")
                for at in range(len(team))
            ]
            assert torch.equal(torch.cat([part["weight"] for part in parts]), expected)
            # Two inverses, to each of the others: once the lower triangle, and its panels before.
            sent = sum(int(part["sent"]) for part in parts) / (len(team) - 1)
            assert 4 * 300**2 <= sent <= 2 * 12 * 300**2


@pytest.mark.parametrize("work", [sum_until_lost, solve_until_lost])
@pytest.mark.parametrize("victim", [0, 2])
def test_the_survivors_of_a_killed_rank_are_told(
    start: Start, victim: int, work: Callable[..., None]
) -> None:
    ready, errors = CONTEXT.Queue(), CONTEXT.Queue()
    processes = start(work, ready, errors)
    for _ in range(WORLD):
        ready.get(timeout=60)
    os.kill(processes[victim].pid, signal.SIGKILL)
    found = dict(errors.get(timeout=60) for _ in range(WORLD - 1))
    assert found.keys() == set(range(WORLD)) - {victim}
    for rank, message in found.items():
        assert f"rank {rank} lost a peer" in message
    for rank, process in enumerate(processes):
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if rank == victim else 0)


def test_rank_0_that_is_not_there_is_an_error() -> None:
    store = host_meeting(HOST)
    port = store.port
    del store
    with pytest.raises(WorkerLostError, match=f"rank 1 cannot reach rank 0 at {HOST}:{port}"):
        Collective.join(1, 2, HOST, port, "gloo", timeout=1)
