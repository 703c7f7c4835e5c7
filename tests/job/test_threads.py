"""Work in pieces on threads; and jobs with the default threads, whose bytes they do not change."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Set
from pathlib import Path

import pytest
import torch

from pipeline.demo_model import demo_texts
from pipeline.runtime.threads import (
    LEAST_ROWS,
    in_pieces,
    pieces_of,
    row_pieces,
    set_threads,
    shares,
    threads,
)
from pipeline.worker import block_worker
from storage.errors import ModelError
from storage.model.files import WeightFileFingerprint, fingerprint_weight_file
from storage.model.folder import ModelFolder
from tests.models.test_real_model import first_blocks
from tests.support.jobs import contents, prune_here, write_text
from tests.support.processes import Driver, until
from tests.support.tiny_models import save_tiny_model


@pytest.fixture(autouse=True)
def one_thread_afterwards() -> Iterator[None]:
    yield
    set_threads(1)


class TestPieces:
    @pytest.mark.parametrize("count", [0, 1, 15, 16, 511, 512, 960, 1024, 4095, 4096, 100_000])
    def test_they_cover_the_rows_in_whole_tiles(self, count: int) -> None:
        pieces = pieces_of(count)
        assert [row for piece in pieces for row in range(count)[piece]] == list(range(count))
        assert all(piece.start % 16 == 0 for piece in pieces)
        assert len(pieces) in (1, 2, 4, 8, 16)
        assert len(pieces) == 1 or count // len(pieces) >= LEAST_ROWS

    def test_they_do_not_depend_on_the_threads(self) -> None:
        one = row_pieces(torch.empty(5000, 4))
        set_threads(3)
        assert row_pieces(torch.empty(5000, 4)) == one

    def test_another_device_cuts_its_own_work(self) -> None:
        assert row_pieces(torch.empty(5000, 4, device="meta")) == [slice(0, 5000)]

    @pytest.mark.parametrize("count", [1, 2, 3, 8])
    def test_each_is_done_once_by_one_thread(self, count: int) -> None:
        set_threads(count)
        done: list[int] = []
        seen: set[tuple[int, int, bool]] = set()

        def work(piece: int) -> None:
            # What a piece cuts into pieces again is done by the same thread.
            in_pieces(done.append, [piece, piece + 100])
            seen.add((threads(), torch.get_num_threads(), torch.is_grad_enabled()))
            time.sleep(0.001)

        in_pieces(work, range(20))
        assert sorted(done) == sorted([*range(20), *range(100, 120)])
        assert threads() == count
        assert seen == {(1, 1, count == 1)}

    def test_several_at_a_time(self) -> None:
        """Each waits for the others."""
        set_threads(3)
        barrier = threading.Barrier(3, timeout=60)
        in_pieces(lambda _: barrier.wait(), range(3))

    @pytest.mark.parametrize("count", [1, 4])
    def test_an_error_is_raised_when_all_have_ended(self, count: int) -> None:
        set_threads(count)
        running: list[int] = []

        def work(piece: int) -> None:
            running.append(piece)
            if piece == 2:
                raise KeyError(piece)
            time.sleep(0.01)
            running.remove(piece)

        with pytest.raises(KeyError, match="2"):
            in_pieces(work, range(100))
        assert running == [2]
        in_pieces(running.append, [7, 8])  # it works again afterwards
        assert sorted(running) == [2, 7, 8]

    def test_shares_are_for_the_threads(self) -> None:
        set_threads(3)
        assert [(part.start, part.stop) for part in shares(10, 1)] == [(0, 4), (4, 8), (8, 10)]
        assert shares(10, 6) == [slice(0, 10)]
        assert shares(0, 6) == []


# -- jobs with the default threads: the machine's cores, divided by the workers -------------------

BLOCKS = 4
WORKERS = (1, 2, 3)
QUICK = {"prox": ("--prox-growth=1.1",)}  # fewer iterations
OPTIONS = ("--executor=local", "--nsamples=8", "--seqlen=32", "--batch-size=2")


class Bench:
    """Commands with default threads, in processes of their own."""

    def __init__(self, folder: Path, model: Path, text: Path, options: tuple[str, ...]) -> None:
        self.folder, self.model, self.text, self.options = folder, model, text, options
        self.drivers: list[Driver] = []

    def start(self, name: str, *options: str) -> Driver:
        """`prox24 prune` into the folder `name`/output."""
        (self.folder / name).mkdir(exist_ok=True)
        arguments = (self.model, self.folder / name / "output", f"--dataset={self.text}")
        log = self.folder / f"log-{len(self.drivers)}"
        self.drivers.append(Driver(["prune", *arguments, *self.options, *options], log))
        return self.drivers[-1]

    def output(self, name: str, *options: str) -> dict[str, bytes]:
        """The output's files."""
        driver = self.start(name, *options)
        assert driver.wait() == 0, driver.errors()
        return contents(self.folder / name / "output")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    # The smallest of the tiny models: LAPACK's inverse of 32 x 32 on two threads is another.
    model = save_tiny_model(tmp_path / "model", blocks=BLOCKS)
    bench = Bench(tmp_path, model, write_text(tmp_path / "text.txt"), OPTIONS)
    yield bench
    for driver in bench.drivers:
        driver.end()


@pytest.mark.parametrize(
    "method",
    ["prox_admm", *(pytest.param(each, marks=pytest.mark.slow) for each in ("prox", "sparsegpt")),
     "wanda"],
)  # fmt: skip
def test_default_threads_on_any_workers(bench: Bench, method: str) -> None:
    options = (f"--method={method}", *QUICK.get(method, ()))
    one, *others = (bench.output(str(n), f"--workers={n}", *options) for n in WORKERS)
    others.append(bench.output("odd", "--workers=1", "--threads=3", *options))
    for other in others:
        assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prox_admm", "prox", "sparsegpt", "wanda"])
def test_default_threads_with_a_real_model(smollm2: Path, tmp_path: Path, method: str) -> None:
    """Its products, attention, Hessians and solves are cut into several pieces."""
    demo_texts(tmp_path)
    model = first_blocks(smollm2, tmp_path / "model", blocks=3)
    options = ("--executor=local", "--nsamples=12", "--seqlen=256", f"--method={method}")
    bench = Bench(tmp_path, model, tmp_path / "calibration.txt", options)
    quick = QUICK.get(method, ())
    one, *others = (bench.output(str(n), f"--workers={n}", *quick) for n in WORKERS)
    for other in others:
        assert one == other


def test_killed_and_resumed_on_other_workers(bench: Bench) -> None:
    expected = bench.output("whole", "--workers=1")
    records = bench.folder / "killed" / "output.run" / "checkpoints"
    driver = bench.start("killed", "--workers=1")
    until(lambda: any(records.glob("*/record.json")) or not driver.running, "a block")
    driver.send(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL, driver.errors()
    assert bench.output("killed", "--workers=2") == expected
    assert "are already done" in bench.drivers[-1].errors()


def test_evaluations(bench: Bench) -> None:
    """Every digit of the figures, of one model and of two that are compared."""
    results = []
    for more in ("--workers=1", "--workers=2", "--workers=3", "--threads=5"):
        log = bench.folder / f"log-{more[2:]}"
        arguments = [bench.model, bench.model, f"--dataset={bench.text}", *OPTIONS, "--json", more]
        driver = Driver(["eval", *arguments], log)
        bench.drivers.append(driver)
        assert driver.wait() == 0, driver.errors()
        results.append(json.loads(driver.output()))
    assert all(result == results[0] for result in results)


def test_weight_files_are_hashed_as_many_at_a_time_as_there_are_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several files that cannot be used the first is named."""
    model = save_tiny_model(tmp_path / "model", weight_files=4)
    both, bad = threading.Barrier(2), list[str]()

    def hashed(source: ModelFolder, file: str, loaded: Set[str]) -> WeightFileFingerprint:
        both.wait(60)
        if file in bad:
            raise ModelError(file)
        return fingerprint_weight_file(source, file, loaded)

    one = prune_here(model, tmp_path / "one", method="magnitude")
    monkeypatch.setattr(block_worker, "fingerprint_weight_file", hashed)
    two = prune_here(model, tmp_path / "two", method="magnitude", threads=2)
    first, second = (contents(result.output) for result in (one, two))
    files = sorted(name for name in first if name.endswith(".safetensors"))
    assert len(files) == 4
    assert all(first[name] == second[name] for name in files)
    bad += files[1:3]
    with pytest.raises(ModelError, match=files[1]):
        prune_here(model, tmp_path / "three", method="magnitude", threads=2)
