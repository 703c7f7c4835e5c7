"""Which of the code's devices the tests of this folder watch: removes one at a time and runs them.

    python -m tests.gpu.mutate                  # every place in pipeline/: some minutes
    python -m tests.gpu.mutate --each-module    # one place in each module
    python -m tests.gpu.mutate solvers/hessian  # places in modules whose path has that in it

A place is a `device=` argument, a `.to(...)` that names a device, or a `.cpu()`; but not the device
`meta`, without which a shape has data too, on the CPU. Each is removed in a process of its own, in
which tests are run until one fails: only those that call its function, the quickest first. Prints
one line a place, and exits with 1 if a module has places of which none is noticed, with 2 if the
tests fail as they are.
"""

from __future__ import annotations

import argparse
import ast
import gc
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# Those that compute in this process; the quickest first.
TESTS = [
    str(ROOT / "tests" / "gpu" / f"test_gpu_{name}")
    for name in (
        "others.py",
        "staging.py",
        "solves.py",
        "collective.py::test_each_backend_is_given_tensors_that_it_can_send",
        "collective.py::test_the_sum_of_the_doctor_is_one_of_gpus",
        "jobs.py",
    )
] + [str(ROOT / "tests" / "planning" / "test_plan_gpu_counts.py")]
_MOST_SECONDS = 900
_META = ("META", "'meta'")


@dataclass(frozen=True)
class Place:
    """A device that the code names. number: in its module, from 0. text: what is removed."""

    module: Path
    number: int
    line: int
    text: str

    def function(self) -> tuple[str, str]:
        """File and qualified name of the innermost function that it is in."""
        path = ROOT / self.module
        codes = _codes(compile(path.read_text(encoding="utf-8"), path, "exec"))
        inside = [code for code in codes if self.line in {line for _, _, line in code.co_lines()}]
        innermost = min(inside, key=lambda code: len(list(code.co_lines())))
        return str(path), innermost.co_qualname


class _Remover(ast.NodeTransformer):
    """Finds the places of a module; removes the one of the given number."""

    def __init__(self, module: Path, removed: int | None = None) -> None:
        self.module, self.removed = module, removed
        self.places: list[Place] = []

    def _found(self, node: ast.AST, text: str) -> bool:
        self.places.append(Place(self.module, len(self.places), node.lineno, text))  # type: ignore[attr-defined]
        return len(self.places) - 1 == self.removed

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        moved = name == "to" and node.args and _names_device(node.args[0])
        if (
            isinstance(node.func, ast.Attribute)
            and (moved or (name == "cpu" and not node.args))
            and self._found(node, f".{name}({', '.join(map(ast.unparse, node.args))})")
        ):
            return node.func.value
        for keyword in list(node.keywords):
            meta = ast.unparse(keyword.value) in _META
            if keyword.arg == "device" and not meta and self._found(node, ast.unparse(keyword)):
                node.keywords.remove(keyword)
        return node


def _names_device(argument: ast.expr) -> bool:
    text = ast.unparse(argument)
    return "device" in text or text == "'cpu'"


def places(root: Path) -> Iterator[Place]:
    """All places in `pipeline/` under `root`."""
    for path in sorted((root / "pipeline").rglob("*.py")):
        remover = _Remover(path.relative_to(root))
        remover.visit(ast.parse(path.read_text(encoding="utf-8")))
        yield from remover.places


def remove(place: Place) -> None:
    """Takes the place out of the functions that this process has imported, or imports again.

    The fake GPU imports modules of kernels anew each time.
    """
    path = str(ROOT / place.module)
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    tree = ast.fix_missing_locations(_Remover(place.module, place.number).visit(tree))
    module = compile(tree, path, "exec")
    load = SourceFileLoader.get_code

    def get_code(loader: SourceFileLoader, name: str) -> CodeType | None:
        return module if loader.path == path else load(loader, name)

    SourceFileLoader.get_code = get_code  # type: ignore[assignment, method-assign]
    changed = {code.co_qualname: code for code in _codes(module)}
    for each in gc.get_objects():
        # Its own code: what wraps a function has the function's name, but the code of another file.
        if type(each) is FunctionType and each.__code__.co_filename == path:
            each.__code__ = changed[each.__code__.co_qualname]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


class Calls:
    """A plugin of pytest that notes which tests call which of some functions, and their seconds."""

    def __init__(self, functions: set[tuple[str, str]]) -> None:
        self.functions = functions
        self.tests: dict[tuple[str, str], set[str]] = {each: set() for each in functions}
        self.seconds: dict[str, float] = {}
        self._files = {file for file, _ in functions}
        self._now = ""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._now = nodeid

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def of(self, place: Place) -> list[str]:
        """The tests that call the function of a place, the quickest first."""
        return sorted(self.tests[place.function()], key=lambda test: self.seconds.get(test, 0.0))

    def profile(self, frame: FrameType, event: str, _: Any) -> None:
        """For `sys.setprofile`."""
        if event == "call" and frame.f_code.co_filename in self._files:
            tests = self.tests.get((frame.f_code.co_filename, frame.f_code.co_qualname))
            if tests is not None:
                tests.add(self._now)


def run_tests(log: Path, tests: Sequence[str] = TESTS, calls: Calls | None = None) -> int:
    """Runs tests in this process until one fails; pytest's status. calls: what notes calls."""
    options = ["-qx", "-p", "no:cacheprovider", "--tb=short", f"--rootdir={ROOT}", *tests]
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        if calls is None:
            return int(pytest.main(options))
        threading.setprofile(calls.profile)
        sys.setprofile(calls.profile)
        try:
            return int(pytest.main(options, plugins=[calls]))
        finally:
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]


def failing_test(place: Place, tests: Sequence[str], log: Path) -> str | None:
    """The first test that fails without the place; None if all pass. In a fork of this process."""
    process = multiprocessing.get_context("fork").Process(target=_without, args=(place, tests, log))
    process.start()
    process.join(_MOST_SECONDS)
    if process.is_alive():
        process.kill()
        return "no end"
    return first_failure(log) or f"status {process.exitcode}" if process.exitcode else None


def _without(place: Place, tests: Sequence[str], log: Path) -> None:
    remove(place)
    os.chdir(ROOT)  # what tests are named from
    os._exit(run_tests(log, tests))


def first_failure(log: Path) -> str | None:
    """The first test that pytest's output names as failed."""
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith(("FAILED", "ERROR ")) and "::" in line:
            return line.split("::", 1)[1].split(" - ")[0]
    return None


def main() -> int:
    """See the top of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="parts of the modules' paths; none: all")
    parser.add_argument("--each-module", action="store_true", help="one place in each module")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: threads do not survive a fork
    chosen = [
        place
        for place in places(ROOT)
        if not options.paths or any(part in str(place.module) for part in options.paths)
    ]
    if options.each_module:
        chosen = list({place.module: place for place in reversed(chosen)}.values())[::-1]
    noticed: dict[Path, bool] = {}
    survivors = 0
    calls = Calls({place.function() for place in chosen})
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        # As it is. After that this process has imported and compiled what the tests need.
        if run_tests(log, calls=calls):
            print(f"{first_failure(log)} fails before anything is removed")
            return 2
        for place in chosen:
            tests = calls.of(place)
            failed = failing_test(place, tests, log) if tests else None
            noticed[place.module] = noticed.get(place.module, False) or failed is not None
            survivors += failed is None
            outcome = f"noticed by {failed}" if failed else f"SURVIVES {len(tests)} tests"
            print(f"{place.module}:{place.line}: {place.text}: {outcome}", flush=True)
    missed = [str(module) for module, was in noticed.items() if not was]
    print(f"{len(chosen)} places, {survivors} survive; nothing noticed in: {missed or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
