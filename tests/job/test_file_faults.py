"""Whatever file or folder a job touches, and whatever is wrong with it: one line, and exit code 2.

Three ways to find what is not caught. Each file and folder that lies there, at several moments of
a job, with each fault of `tests.support.file_faults`; the same while the job runs; and an error of
the system at each point where a job changes a file. In all of them the fault is then removed, and
the same command ends as if nothing had been. `python benchmarks/file_faults.py` counts.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import tempfile
from pathlib import Path

import pytest

from storage.files.temporary import final_name
from tests.support.file_faults import FAULTS, complaint
from tests.support.file_scenes import PLAIN, RAY, SCENES, Case, RunningScene, Scene, fill
from tests.support.injection import Injection
from tests.support.kill_matrix import Case as Job
from tests.support.kill_matrix import Matrix

# What a disk, a network filesystem, a quota or another user's change may answer, in turn.
NUMBERS = (
    errno.EIO, errno.ENOSPC, errno.EACCES, errno.ESTALE, errno.EROFS, errno.EDQUOT, errno.EMFILE,
    errno.EPERM, errno.ETIMEDOUT, errno.EBUSY, errno.ENAMETOOLONG, errno.ENFILE,
)  # fmt: skip
QUICK_POINTS = 12
QUICK_SCENE = "a block"
# The files and folders of a reconstruction: of a block that is solved, and of one that is trained.
RECONSTRUCTION = r"targets|solved|block-001/rank-|trained-"
QUICK_CASES = 8  # of faults of all kinds, played to the end


def played(scene: Scene, cases: list[Case], *, again: bool = True) -> None:
    """All these cases; fails with all that is wrong."""
    problems = {str(case): scene.problem(case, again=again) for case in cases}
    wrong = {case: problem for case, problem in problems.items() if problem is not None}
    assert not wrong, "\n".join(f"{case}: {problem}" for case, problem in wrong.items())


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A job that was killed after its first block."""
    return SCENES[QUICK_SCENE](tmp_path_factory.mktemp("scene"))


def test_the_scene_has_every_kind_of_file(scene: Scene) -> None:
    """Else the tests below would prove little."""
    names = {case.path for case in scene.cases()}
    assert {"in/model/config.json", "in/model/tokenizer.json", "in/text.txt", "in/job.yaml"} < names
    assert {"state/run/run.json", "state/run/tokens.arrow", "state/run/checkpoints"} < names
    kinds = {case.fault.name for case in scene.cases()}
    assert len(kinds) == 6
    assert len(scene.cases()) > 150


def test_each_file_that_may_not_be_read(scene: Scene) -> None:
    played(scene, scene.cases(["unreadable"]), again=False)


def test_faults_of_all_kinds(scene: Scene) -> None:
    cases = scene.cases()
    played(scene, cases[:: len(cases) // QUICK_CASES])


def test_faults_of_what_a_reconstruction_writes(tmp_path: Path) -> None:
    """A solved block's record and slices, trained slices, targets: some faults of each."""
    scene = SCENES["a solved block"](tmp_path)
    found = [(re.search(RECONSTRUCTION, case.path), case) for case in scene.cases()]
    cases = [case for match, case in found if match]
    assert {match[0] for match, _ in found if match} == set(RECONSTRUCTION.split("|"))
    played(scene, cases[:: len(cases) // QUICK_CASES])


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENES)
def test_every_fault_of_every_file(tmp_path: Path, name: str) -> None:
    scene = SCENES[name](tmp_path)
    played(scene, scene.cases())


@pytest.mark.slow
def test_on_ray() -> None:
    """Refused by a worker, which is named; nothing is tried again."""
    weights = "in/model/model-00002-of-00002.safetensors"
    # Ray takes no long paths.
    with tempfile.TemporaryDirectory() as folder:
        arguments = (*PLAIN, "--executor=ray")
        scene = RunningScene(Path(folder), fill, arguments, phase="solve", block=1, executor=RAY)
        for path, name in ((weights, "unreadable"), ("state/run/checkpoints", "unwritable")):
            played(scene, [Case(path, FAULTS[name])])
            assert "prox24: worker " in scene.said
            assert path in scene.said
            assert "trying again" not in scene.said


# -- errors of the system, wherever a job changes a file -------------------------------------------


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("matrix"))


def failing(matrix: Matrix, point: int, number: int) -> str | None:
    """A job in which the operation at a point fails; what is wrong with how it ends, or None."""
    job = Job(matrix)
    status = job.run(Injection(job.folder, at=point, error=number))
    if status == 2:
        path = final_name(Path(job.folder, matrix.points[point].split()[-1]))
        if wrong := complaint(job.errors(), path):
            return f"{wrong}: {job.errors()}"
        job.check_committed()
        job.resumed()
    elif status != 0:
        return f"status {status}: {job.errors()}"
    else:
        job.check_finished()
    job.end()
    return None


def all_failing(matrix: Matrix, points: list[int]) -> None:
    wrong = []
    for point, number in zip(points, itertools.cycle(NUMBERS), strict=False):
        if problem := failing(matrix, point, number):
            wrong.append(f"{os.strerror(number)} {matrix.points[point]}: {problem}")
    assert not wrong, "\n".join(wrong)


def test_an_operation_that_fails(matrix: Matrix) -> None:
    all_failing(matrix, matrix.spread(QUICK_POINTS))


@pytest.mark.slow
def test_every_operation_that_fails(matrix: Matrix) -> None:
    all_failing(matrix, list(range(len(matrix.points))))
